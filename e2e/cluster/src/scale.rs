//! `cargo e2e cluster scale`: memory, CPU time and traffic of one agent with different numbers of
//! SkeinNodes in a real API server.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use clap::Args;
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use serde_json::{Value, json};

use super::{Kube, Options, programs, skein};
use skein_lab::agent::binary;
use skein_lab::console::Console;
use skein_lab::load::median;
use skein_lab::process::{Process, children, cpu_seconds, resident_bytes};
use skein_lab::{UNDERLAY, registry};
use skein_lab::{cargo, packages};

/// Options of `cargo e2e cluster scale`.
#[derive(Debug, Args)]
pub struct Scale {
    /// Numbers of SkeinNodes to measure, in addition to the agent's own
    #[arg(long, value_delimiter = ',', default_value = "10,1000,5000")]
    nodes: Vec<u32>,
    /// Number of changes of one SkeinNode
    #[arg(long, default_value_t = 20)]
    changes: u32,
    /// Seconds without a change, in which the idle agent is measured
    #[arg(long, default_value_t = 60)]
    idle: u64,
}

/// Maximum time until an agent is ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

/// Maximum time until the agent has received the change of a SkeinNode.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// Text of the log line that the agent writes when its interface is configured.
const READY_LOG_TEXT: &str = "interface configured: ";

/// Text of the agent's log line about changed node records.
const CHANGE_LOG_TEXT: &str = "node records have changed";

/// Number of kubectl processes that create SkeinNodes concurrently.
const CREATORS: usize = 4;

/// Runs `cargo e2e cluster scale`: measures, and prints a table.
///
/// # Errors
/// If the cluster cannot be built, if the agent does not become ready, or if the agent does not
/// receive the change of a SkeinNode within 10 s.
pub fn run(options: &Scale) -> Result<()> {
    let console = Console::new();
    programs::build(&console)?;
    packages::ensure(&[packages::DEMO], &console)?;
    console.step("building skein-agent (release)");
    console.pause(cargo::build_agent)?;
    registry::prepare();
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY);
    table.set_header([
        "SkeinNodes",
        "ready s",
        "CPU s",
        "received MiB",
        "control RSS MiB",
        "data RSS MiB",
        "change ms",
        "CPU ms per change",
        "idle: CPU s/h",
        "KiB/h",
        "writes/h",
    ]);
    for &count in &options.nodes {
        console.step(&format!("{count} SkeinNodes"));
        table.add_row(measure(count, options)?);
    }
    drop(console);
    println!("{table}");
    Ok(())
}

fn measure(count: u32, options: &Scale) -> Result<Vec<String>> {
    let kube = Kube::up(&Options { nodes: 1, ..Options::default() })?;
    let definition = cargo::workspace().join("charts/skein/crds/skeinnodes.yaml");
    kube.kubectl(&["apply", "--filename", &definition.to_string_lossy()])?;
    create(&kube, count)?;

    let mut agent = Agent::new(&kube)?;
    let received = agent.received()?;
    let began = Instant::now();
    agent.start()?;
    let ready = began.elapsed();
    // Work that follows the start counts as part of the start.
    thread::sleep(Duration::from_secs(5));
    let cpu = cpu_seconds(&agent.pids()?);
    let received = agent.received()? - received;
    let pids = agent.pids()?;
    let memory = pids.iter().map(|&pid| resident_bytes(pid)).collect::<Result<Vec<_>>>()?;

    let mut took = vec![];
    for number in 0..options.changes {
        let old = agent.changes()?;
        let endpoint = format!("203.0.113.{}:51900", 1 + number);
        let patch = json!({ "spec": { "endpoints": [endpoint] } }).to_string();
        let start = Instant::now();
        kube.kubectl(&["patch", "skeinnode", "fleet-0", "--type=merge", "--patch", &patch])?;
        while agent.changes()? == old {
            thread::sleep(Duration::from_millis(2));
            if start.elapsed() > CHANGE_TIMEOUT {
                let seconds = CHANGE_TIMEOUT.as_secs();
                bail!("the agent did not receive the change of a SkeinNode within {seconds} s");
            }
        }
        took.push(start.elapsed().as_secs_f64() * 1e3);
    }
    thread::sleep(Duration::from_secs(1));
    let changed = cpu_seconds(&agent.pids()?) - cpu;

    let before = (cpu_seconds(&agent.pids()?), agent.received()?, agent.writes(&kube)?);
    thread::sleep(Duration::from_secs(options.idle));
    let after = (cpu_seconds(&agent.pids()?), agent.received()?, agent.writes(&kube)?);
    let hourly = 3600.0 / options.idle as f64;
    Ok(vec![
        count.to_string(),
        format!("{:.2}", ready.as_secs_f64()),
        format!("{cpu:.2}"),
        format!("{:.1}", received as f64 / 1_048_576.0),
        (memory[0] >> 20).to_string(),
        memory.get(2).map_or_else(|| "-".to_owned(), |bytes| (bytes >> 20).to_string()),
        format!("{:.0}", median(took).unwrap_or_default()),
        format!("{:.1}", changed * 1e3 / f64::from(options.changes.max(1))),
        format!("{:.1}", (after.0 - before.0) * hourly),
        format!("{:.0}", (after.1 - before.1) as f64 / 1024.0 * hourly),
        format!("{:.0}", (after.2 - before.2) * hourly),
    ])
}

/// Creates `count` SkeinNodes, each with its own key and prefix.
fn create(kube: &Kube, count: u32) -> Result<()> {
    let node = |n: u32| -> Value {
        let mut key = [7; 32];
        key[..4].copy_from_slice(&n.to_be_bytes());
        // The laboratory uses no address from 11.0.0.0 upwards.
        let cidr = Ipv4Addr::from(0x0b00_0000 + (n << 8));
        json!({
            "apiVersion": "skein.network/v1alpha1", "kind": "SkeinNode",
            "metadata": { "name": format!("fleet-{n}") },
            "spec": {
                "publicKey": BASE64.encode(key),
                "endpoints": [format!("198.51.100.{}:51900", 1 + n % 250)],
                "podCIDRs": [format!("{cidr}/24")],
            },
        })
    };
    thread::scope(|scope| {
        let creators: Vec<_> = (0..CREATORS)
            .map(|part| {
                let mine = (0..count).filter(move |n| *n as usize % CREATORS == part);
                let items: Vec<Value> = mine.map(node).collect();
                scope.spawn(move || {
                    if items.is_empty() {
                        return Ok(());
                    }
                    let list = json!({ "apiVersion": "v1", "kind": "List", "items": items });
                    let path = kube.directory().join(format!("fleet-{part}.json"));
                    fs::write(&path, list.to_string())?;
                    let words = ["create", "--output=name", "--filename", &path.to_string_lossy()];
                    kube.kubectl(&words).map(drop)
                })
            })
            .collect();
        let panicked = |_| Err(anyhow::anyhow!("a creator panicked"));
        creators.into_iter().try_for_each(|creator| creator.join().unwrap_or_else(panicked))
    })
}

/// The agent on the cluster's node, started by this process instead of its kubelet.
struct Agent {
    netns: String,
    directory: std::path::PathBuf,
    process: Option<Process>,
}

impl Agent {
    fn new(kube: &Kube) -> Result<Self> {
        let directory = kube.directory().join("agent");
        fs::create_dir_all(&directory)?;
        let path = |name: &str| directory.join(name).to_string_lossy().into_owned();
        let config = toml::toml! {
            [kubernetes]
            enabled = true
            [dataplane]
            lanes = 2
            [control]
        };
        let mut config = config;
        config.insert("name".into(), kube.nodes[0].name().into());
        config.insert("state_dir".into(), path("state").into());
        let tables = [
            ("kubernetes", "kubeconfig", kube.kubeconfig().to_string_lossy().into_owned()),
            ("dataplane", "socket", path("dataplane.sock")),
            ("control", "socket", path("control.sock")),
        ];
        for (table, key, value) in tables {
            let table = config.get_mut(table).and_then(toml::Value::as_table_mut);
            table.context("no table")?.insert(key.into(), value.into());
        }
        fs::write(directory.join("agent.toml"), config.to_string())?;
        Ok(Self { netns: kube.nodes[0].net()?.name().to_owned(), directory, process: None })
    }

    fn log(&self) -> std::path::PathBuf {
        self.directory.join("agent.log")
    }

    fn start(&mut self) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(binary()?);
        command.args(["run", "--config"]).arg(self.directory.join("agent.toml"));
        self.process = Some(Process::start(&mut command, &self.log())?);
        let end = Instant::now() + READY_TIMEOUT;
        while !fs::read_to_string(self.log())?.contains(READY_LOG_TEXT) {
            self.process.as_mut().context("not started")?.check_alive()?;
            if Instant::now() > end {
                let seconds = READY_TIMEOUT.as_secs();
                bail!("not ready within {seconds} s: {}", fs::read_to_string(self.log())?);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Returns the process ids of the control process, the keeper and the data process.
    fn pids(&self) -> Result<Vec<i32>> {
        let control = self.process.as_ref().context("not started")?.pid();
        let keepers = children(control);
        let workers = keepers.iter().flat_map(|&keeper| children(keeper));
        Ok([control].into_iter().chain(keepers.iter().copied()).chain(workers).collect())
    }

    /// Returns the number of times that the node records have changed.
    fn changes(&self) -> Result<usize> {
        Ok(fs::read_to_string(self.log())?.matches(CHANGE_LOG_TEXT).count())
    }

    /// Returns the number of bytes that the node received; nearly all come from the API server.
    fn received(&self) -> Result<u64> {
        let words = ["netns", "exec", &self.netns, "cat"];
        let file = Path::new("/sys/class/net").join(UNDERLAY).join("statistics/rx_bytes");
        let text = skein_lab::process::run(Command::new("ip").args(words).arg(file))?;
        Ok(text.trim().parse()?)
    }

    /// Returns the number of the agent's write requests to the API server.
    fn writes(&self, kube: &Kube) -> Result<f64> {
        let metrics = skein::metrics(&kube.nodes[0])?;
        let of = |verb: &str| {
            metrics.sum("skein_kubernetes_requests_total", &[&format!("verb=\"{verb}\"")])
        };
        Ok(of("create") + of("patch") + of("delete"))
    }
}

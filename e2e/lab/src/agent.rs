//! Skein agents in the laboratory's nodes: their configuration, their life, what they report.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use toml::Table;

pub use super::cluster::Cluster;
pub use super::metrics::Metrics;
use super::process::{self, Finished, Process};
pub use super::record::Record;
use super::{Family, Lab, Netns, Node};

/// How long an agent may take to be ready on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(20);

/// Default port of the overlay.
pub const PORT: u16 = 51900;

/// What containerd needs for the loopback, what comes behind Skein's plugin by default, and what may.
const REFERENCE_PLUGINS: [&str; 4] = ["loopback", "portmap", "bandwidth", "tuning"];

/// The agent's program: `SKEIN_AGENT_BIN`, or beside this program where cargo puts both.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SKEIN_AGENT_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("finding this program")?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("skein-agent"));
    found.into_iter().find(|path| path.is_file()).context(
        "no skein-agent beside this program: build it first (cargo build --release -p skein-agent) \
         or name it in SKEIN_AGENT_BIN",
    )
}

/// An agent of one node; killed when dropped.
#[derive(Debug)]
pub struct Agent {
    /// Its own record.
    pub record: Record,
    /// What is started: [`binary`], unless a test sets another.
    pub program: PathBuf,
    /// Its configuration; takes effect with the next start.
    pub config: Table,
    /// Its environment, beside the inherited one.
    pub environment: Vec<(String, String)>,
    /// A line of shell that comes before each of its commands, in a mount namespace of theirs.
    pub prelude: Option<String>,
    netns: String,
    directory: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Writes an agent's configuration and key, and starts nothing. `index` tells several agents of
    /// one node apart; the first has 0.
    pub fn prepare(lab: &Lab, node: &Node, underlay: Family, index: u16) -> Result<Self> {
        let name = if index == 0 { node.name.clone() } else { format!("{}-{index}", node.name) };
        let directory = lab.directory().join(&name);
        fs::create_dir_all(directory.join("nodes.d"))?;
        let path = |file: &str| directory.join(file).to_string_lossy().into_owned();
        let port = PORT + index;
        let address = node.underlay(underlay);
        let config = toml::toml! {
            name = "unset"
            cluster_id = "laboratory"
            [interface]
            [underlay]
            [dataplane]
            lanes = 2
            [offload]
            [metrics]
            [control]
            [log]
            level = "info"
        };
        let key = path("node.key");
        let mut agent = Self {
            record: Record {
                name: name.clone(),
                public_key: new_key(Path::new(&key))?,
                second_public_key: None,
                endpoints: vec![std::net::SocketAddr::new(address, port).to_string()],
                pod_cidrs: Family::BOTH.map(|family| node.pod_cidr(family)).into(),
            },
            program: binary()?,
            config,
            environment: vec![],
            prelude: None,
            netns: node.ns.name().to_owned(),
            directory: directory.clone(),
            process: None,
        };
        agent.set("name", name);
        agent.set("state_dir", path("state"));
        agent.set("private_key_file", key);
        agent.set("nodes", path("nodes.d"));
        agent.set("interface.name", format!("skein{index}"));
        agent.set("underlay.addresses", vec![address.to_string()]);
        agent.set("underlay.port", i64::from(port));
        agent.set("dataplane.socket", path("dataplane.sock"));
        agent.set("metrics.listen", format!("127.0.0.1:{}", 9464 + index));
        agent.set("control.socket", path("control.sock"));
        Ok(agent)
    }

    /// Sets one entry of the configuration (`table.key`); in force from the next start.
    pub fn set(&mut self, key: &str, value: impl Into<toml::Value>) {
        let (table, key) = match key.split_once('.') {
            None => (&mut self.config, key),
            Some((table, key)) => {
                let entry = self.config.entry(table).or_insert_with(|| Table::new().into());
                match entry {
                    toml::Value::Table(table) => (table, key),
                    _ => return,
                }
            }
        };
        table.insert(key.into(), value.into());
    }

    /// Has it serve the CNI plugin, with files of its own for everything. The reference plugins are where
    /// it puts its own.
    pub fn serve_pods(&mut self) -> Result<()> {
        let path = |file: &str| self.directory.join(file).to_string_lossy().into_owned();
        let paths = ["cni.sock", "spool", "bin", "net.d"].map(path);
        for (key, path) in ["socket", "spool", "bin_dir", "conf_dir"].into_iter().zip(paths) {
            self.set(&format!("cni.{key}"), path);
        }
        self.set("cni.enabled", true);
        let bin = self.cni_directory("bin_dir");
        fs::create_dir_all(&bin)?;
        REFERENCE_PLUGINS.iter().try_for_each(|name| {
            fs::copy(Path::new("/usr/lib/cni").join(name), bin.join(name))
                .map(drop)
                .with_context(|| format!("{name} of containernetworking-plugins"))
        })
    }

    /// Where it listens for the plugin.
    pub fn cni_socket(&self) -> &str {
        self.text("cni", "socket")
    }

    /// Where the plugin leaves what it could not say.
    pub fn cni_spool(&self) -> &Path {
        Path::new(self.text("cni", "spool"))
    }

    /// A directory of its `[cni]` table.
    pub fn cni_directory(&self, key: &str) -> PathBuf {
        self.text("cni", key).into()
    }

    /// The directory of everything that is its own.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Name of the network namespace that it runs in.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// The socket of its data process.
    pub fn dataplane_socket(&self) -> &str {
        self.text("dataplane", "socket")
    }

    /// Where its state lies.
    pub fn state_directory(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// An entry of the configuration.
    fn text(&self, table: &str, key: &str) -> &str {
        self.config[table].get(key).and_then(toml::Value::as_str).unwrap_or_default()
    }

    /// Where the records are that this agent watches.
    pub fn records_directory(&self) -> PathBuf {
        self.directory.join("nodes.d")
    }

    /// Gives this agent a record; it replaces one of the same name.
    pub fn put_record(&self, record: &Record) -> Result<()> {
        let path = self.records_directory().join(format!("{}.toml", record.name));
        // As a careful administrator does it: the watcher never sees half a file.
        let new = path.with_extension("new");
        fs::write(&new, record.to_toml())?;
        fs::rename(&new, &path).with_context(|| format!("writing {}", path.display()))
    }

    /// Takes a record away from this agent.
    pub fn remove_record(&self, name: &str) -> Result<()> {
        let path = self.records_directory().join(format!("{name}.toml"));
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// Writes the configuration file; returns its path.
    pub fn write_config(&self) -> Result<PathBuf> {
        let path = self.directory.join("agent.toml");
        fs::write(&path, self.config.to_string())?;
        Ok(path)
    }

    /// A run of `skein-agent` with these arguments and `--config`, inside the node.
    pub fn command(&self, arguments: &[&str]) -> Result<std::process::Command> {
        let config = self.write_config()?;
        let mut command = std::process::Command::new("ip");
        command.envs(self.environment.iter().cloned());
        command.args(["netns", "exec", &self.netns]);
        if let Some(prelude) = &self.prelude {
            command.args(["sh", "-c", &format!("{prelude} && exec \"$@\""), "sh"]);
        }
        command.arg(&self.program).args(arguments).arg("--config").arg(config);
        Ok(command)
    }

    /// Starts it and waits until it says that it is ready.
    pub fn start(&mut self) -> Result<()> {
        self.launch()?;
        self.wait_ready()
    }

    /// Starts it and returns at once.
    pub fn launch(&mut self) -> Result<()> {
        let mut command = self.command(&["run"])?;
        self.process = Some(Process::start(&mut command, &self.log())?);
        Ok(())
    }

    /// Starts another agent, which takes the place of the one that runs, and waits until it is
    /// ready; gives that one's process.
    pub fn take_over(&mut self) -> Result<Process> {
        let before = self.replace()?;
        self.wait_ready()?;
        Ok(before)
    }

    /// The same, without waiting until the new agent is ready.
    pub fn replace(&mut self) -> Result<Process> {
        let mut command = self.command(&["run", "--take-over"])?;
        let next = Process::start(&mut command, &self.log())?;
        let mut before = self.process.replace(next).context("agent not started")?;
        let end = Instant::now() + READY_LIMIT;
        // Until then, the previous agent answers.
        while before.exited().is_none() && !holds(before.pid()) {
            if Instant::now() > end {
                bail!("no agent has taken over:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(before)
    }

    /// Starts a data process as somebody else would for `dataplane.mode = "external"`; gives its keeper.
    pub fn start_dataplane(&self) -> Result<Process> {
        self.dataplane_command(&[])
    }

    /// The same, taking over from the one that is there.
    pub fn take_over_dataplane(&self) -> Result<Process> {
        self.dataplane_command(&["--take-over"])
    }

    fn dataplane_command(&self, more: &[&str]) -> Result<Process> {
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(&self.program);
        command.args(["dataplane", "--socket", self.text("dataplane", "socket")]).args(more);
        Process::start(&mut command, &self.log())
    }

    /// Waits until it says that it is ready.
    pub fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + READY_LIMIT;
        loop {
            self.process.as_mut().context("agent not started")?.check_alive()?;
            match self.http("/readyz") {
                Ok(answer) if answer.status == 200 => return Ok(()),
                Ok(answer) if Instant::now() > end => bail!(
                    "{} not ready: {} {}\n{}",
                    self.record.name,
                    answer.status,
                    answer.body,
                    self.log_tail()
                ),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(self.log_tail()).context("agent not ready"));
                }
                _ => thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    /// Runs it to its end, for what must fail.
    pub fn run_to_end(&self, limit: Duration) -> Result<Finished> {
        process::finish(&mut self.command(&["run"])?, &[], limit)
    }

    /// Runs another of its commands to the end.
    pub fn run_command(&self, arguments: &[&str]) -> Result<Finished> {
        process::finish(&mut self.command(arguments)?, &[], Duration::from_secs(20))
    }

    /// Asks it to end; its exit code.
    pub fn stop(&mut self) -> Result<i32> {
        let process = self.process.as_mut().context("agent not started")?;
        let code = process.stop(Duration::from_secs(10))?;
        self.process = None;
        Ok(code)
    }

    /// Kills the control process (SIGKILL) and leaves the data process alone.
    pub fn kill_control(&mut self) {
        self.process = None;
    }

    /// Process id of the control process.
    pub fn control_pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Process ids of its data processes, found by their arguments.
    pub fn dataplane_pids(&self) -> Vec<i32> {
        self.dataplane(true)
    }

    /// Process ids of the keepers of its data processes; not of those that have given theirs away.
    pub fn keeper_pids(&self) -> Vec<i32> {
        let mut keepers = self.dataplane(false);
        keepers.retain(|keeper| !process::children(*keeper).is_empty());
        keepers
    }

    fn dataplane(&self, worker: bool) -> Vec<i32> {
        let socket = self.text("dataplane", "socket");
        let is_ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|&b| b == 0).collect();
            let has = |word: &str| words.contains(&word.as_bytes());
            has("dataplane") && has(socket) && has("--worker") == worker
        };
        super::registry::pids_in(&self.netns).into_iter().filter(is_ours).collect()
    }

    /// All its process ids.
    pub fn pids(&self) -> Vec<i32> {
        let dataplane = self.keeper_pids().into_iter().chain(self.dataplane_pids());
        self.control_pid().into_iter().chain(dataplane).collect()
    }

    /// What `status -o json` prints.
    pub fn status(&self) -> Result<Value> {
        let finished = self.run_command(&["status", "-o", "json", "--interval", "0"])?;
        if finished.code != 0 {
            bail!("status ended with code {}: {}", finished.code, finished.stderr);
        }
        serde_json::from_str(&finished.stdout).context("status is not JSON")
    }

    /// The data process's report, as a part of the status.
    pub fn report(&self) -> Result<Value> {
        let mut status = self.status()?;
        let report = status["report"].take();
        if report.is_null() {
            bail!("no report of the data process in the status: {status}");
        }
        Ok(report)
    }

    /// GET from its HTTP server.
    pub fn http(&self, path: &str) -> Result<crate::load::http::Answer> {
        let mut address: std::net::SocketAddr =
            self.text("metrics", "listen").parse().context("metrics.listen")?;
        if address.ip().is_unspecified() {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let path = path.to_owned();
        Netns::run_in(&self.netns, move || crate::load::http::get(address, &path))?
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        let answer = self.http("/metrics")?;
        if answer.status != 200 {
            bail!("/metrics answers {}", answer.status);
        }
        Ok(Metrics(answer.body))
    }

    /// Its log file.
    pub fn log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// The end of its log, with its name.
    pub fn log_tail(&self) -> String {
        let tail = process::tail(&self.log(), 30);
        format!("--- the log of {} ends with:\n{tail}", self.record.name)
    }

    /// The address that peers reach it at.
    pub fn underlay_address(&self) -> Result<IpAddr> {
        let endpoint: std::net::SocketAddr = self.record.endpoints[0].parse()?;
        Ok(endpoint.ip())
    }
}

/// Returns whether a process has handed over the agent's role and waits for it.
fn holds(pid: i32) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.starts_with(b"skein-agent\0hold\0")
}

/// Makes a key file (0600); returns the public half.
pub fn new_key(path: &Path) -> Result<String> {
    let binary = binary()?;
    let mut keygen = std::process::Command::new(&binary);
    let private = process::run(keygen.arg("keygen"))?;
    fs::write(path, &private)?;
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let mut pubkey = std::process::Command::new(&binary);
    let public = process::run_with_input(pubkey.arg("pubkey"), private.as_bytes())?;
    Ok(public.trim().to_owned())
}

//! `cargo e2e versions`: take-overs between an earlier commit and this tree under traffic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use skein_lab::agent::{self, Cluster};
use skein_lab::console::Console;
use skein_lab::instance::Instance;
use skein_lab::load::ping::{Loss, Pings};
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Plan, registry};
use skein_lab::{cargo, checks, programs};

/// Last commit before the serialised items were renamed.
const EARLIER_COMMIT: &str = "19ee88e9";
/// Interval of the pings.
const PING_INTERVAL: Duration = Duration::from_millis(5);
/// Size of the transfer that runs during a take-over, bytes, and its rate, bytes per second.
const TRANSFER: (u64, u64) = (60 << 20, 20 << 20);
/// Duration of the traffic before and after a take-over.
const TRAFFIC_MARGIN: Duration = Duration::from_millis(500);

/// Options of `cargo e2e versions`.
#[derive(Debug, Args)]
pub struct Options {
    /// Commit to take over from and back to
    #[arg(long, default_value = EARLIER_COMMIT)]
    from: String,
}

/// Builds both versions and runs the take-overs.
///
/// # Errors
/// Returns an error if a build fails, a ping is lost, the transfer fails, or a take-over needs a
/// handshake.
pub fn run(options: &Options) -> Result<()> {
    let console = Console::new();
    console.step(&format!("building commit {}", options.from));
    let earlier = build_earlier(&options.from)?;
    console.step("building this tree");
    cargo::build_agent()?;
    let current = agent::binary()?;
    registry::prepare();
    let order = [("to this tree", &current), ("back", &earlier), ("to this tree again", &current)];
    console.step("take-overs of an agent that starts its data process itself");
    embedded(&earlier, &order, &console)?;
    console.step("take-overs between pods of the chart");
    pods(&earlier, &order, &console)?;
    console.step("agents of both versions as peers");
    peers(&earlier, &current, &console)
}

/// Builds the agent of a commit outside of the working tree and returns its path.
fn build_earlier(commit: &str) -> Result<PathBuf> {
    let directory = programs::cache()?.join("versions").join(commit);
    let source = directory.join("source");
    if !source.exists() {
        fs::create_dir_all(&directory)?;
        let unpacked = tempfile::tempdir_in(&directory)?;
        unpack(commit, unpacked.path())?;
        fs::rename(unpacked.keep(), &source)?;
    }
    let target = directory.join("target");
    let build = ["build", "--release", "--package=skein-agent", "--package=skein-cni", "--bins"];
    let status = cargo::command(&build)
        .current_dir(&source)
        .env("CARGO_TARGET_DIR", &target)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "cannot build commit {commit}");
    Ok(target.join("release/skein-agent"))
}

fn unpack(commit: &str, directory: &Path) -> Result<()> {
    let mut archive = Command::new("git")
        .args(["archive", commit])
        .current_dir(cargo::workspace())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start git")?;
    let files = archive.stdout.take().context("git has no output")?;
    let unpacked =
        Command::new("tar").arg("-x").current_dir(directory).stdin(files).status()?.success();
    ensure!(
        archive.wait()?.success() && unpacked,
        "cannot read commit {commit}. Fetch the whole history: git fetch --unshallow"
    );
    Ok(())
}

/// Agents that take over one after the other: text to print, and path of the program.
type Order<'a> = [(&'a str, &'a PathBuf)];

fn embedded(first: &Path, order: &Order<'_>, console: &Console) -> Result<()> {
    let mut cluster = prepare(first)?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    for (step, program) in order {
        cluster.agents[0].program = program.to_path_buf();
        let handshakes = handshakes(&cluster)?;
        let (agents, lab) = (&mut cluster.agents, &cluster.lab);
        let traffic = Traffic::start(lab)?;
        agents[0].take_over()?.stop(Duration::from_secs(20))?;
        let (loss, pause) = traffic.end()?;
        report(step, &loss, pause, &cluster, handshakes, console)?;
    }
    checks::all_reach_all(&cluster.lab)
}

fn pods(first: &Path, order: &Order<'_>, console: &Console) -> Result<()> {
    let mut cluster = prepare(first)?;
    cluster.agents[0].set("dataplane.mode", "external");
    cluster.agents[1].launch()?;
    let mut pod = Instance::start(&cluster.agents[0], "pod-0")?;
    pod.wait_ready()?;
    cluster.agents[1].wait_ready()?;
    checks::all_reach_all(&cluster.lab)?;
    for (number, (step, program)) in (1..).zip(order) {
        cluster.agents[0].program = program.to_path_buf();
        let handshakes = handshakes(&cluster)?;
        let traffic = Traffic::start(&cluster.lab)?;
        let next = Instance::start(&cluster.agents[0], &format!("pod-{number}"))?;
        next.wait_ready()?;
        ensure!(next.has_dataplane(), "the new pod did not take over:\n{}", next.log_tail());
        std::mem::replace(&mut pod, next).delete();
        let (loss, pause) = traffic.end()?;
        report(step, &loss, pause, &cluster, handshakes, console)?;
    }
    checks::all_reach_all(&cluster.lab)
}

/// Checks that agents of both versions exchange packets, whichever of them starts the handshake.
fn peers(earlier: &Path, current: &Path, console: &Console) -> Result<()> {
    for programs in [[earlier, current], [current, earlier]] {
        let mut cluster = prepare(programs[0])?;
        cluster.agents[1].program = programs[1].to_path_buf();
        cluster.start()?;
        checks::all_reach_all(&cluster.lab)?;
    }
    console.print("  every pod reaches every pod\n");
    Ok(())
}

fn prepare(program: &Path) -> Result<Cluster> {
    let mut cluster = Cluster::prepare(Lab::new(&Plan::default())?, Family::V4)?;
    cluster.verbose = false;
    for agent in &mut cluster.agents {
        agent.program = program.to_path_buf();
    }
    Ok(cluster)
}

/// Returns the number of handshakes that the second node, which is not replaced, has started.
fn handshakes(cluster: &Cluster) -> Result<f64> {
    let metrics = cluster.agents[1].metrics()?;
    Ok(metrics.sum("skein_handshakes_total", &["result=\"initiated\""]))
}

fn report(
    step: &str,
    loss: &Loss,
    pause: f64,
    cluster: &Cluster,
    handshakes_before: f64,
    console: &Console,
) -> Result<()> {
    console
        .print(&format!("  {step}: {loss}; longest pause of the transfer {:.0} ms\n", pause * 1e3));
    ensure!(loss.lost == 0, "{step}: {loss}\n{}", cluster.logs());
    ensure!(
        handshakes(cluster)? == handshakes_before,
        "{step}: the sessions were not taken over\n{}",
        cluster.logs()
    );
    Ok(())
}

/// Pings and a TCP transfer from the first node's pod to the second's.
struct Traffic {
    pings: Pings,
    transfer: Transfer,
    _log: tempfile::NamedTempFile,
}

impl Traffic {
    fn start(lab: &Lab) -> Result<Self> {
        let (from, to) = (lab.pod(0), lab.pod(1));
        let log = tempfile::NamedTempFile::new()?;
        let (bytes, rate) = TRANSFER;
        let address = (to.address(Family::V4), 7000).into();
        let transfer = Transfer::start(&from.ns, &to.ns, address, bytes, Some(rate))?;
        let pings = Pings::start(&from.ns, to.address(Family::V4), PING_INTERVAL, log.path())?;
        thread::sleep(TRAFFIC_MARGIN);
        Ok(Self { pings, transfer, _log: log })
    }

    /// Returns the loss of the pings and the longest pause of the transfer in seconds.
    fn end(self) -> Result<(Loss, f64)> {
        thread::sleep(TRAFFIC_MARGIN);
        let loss = self.pings.end()?;
        Ok((loss, self.transfer.join()?.longest_pause))
    }
}

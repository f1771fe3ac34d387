//! `cargo e2e versions`: take-overs between an earlier commit and this tree under traffic.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;

use skein_lab::agent::{self, Agent, Cluster};
use skein_lab::console::Console;
use skein_lab::instance::Instance;
use skein_lab::load::transfer::Transfer;
use skein_lab::{Family, Lab, Plan, registry};
use skein_lab::{cargo, checks, programs};

/// Last commit before the Rust fields of messages and stored files were renamed. Their serialised
/// names stayed the same.
const EARLIER_COMMIT: &str = "19ee88e9";
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
    take_over_agents(&earlier, &order, &console)?;
    console.step("take-overs between pods of the chart");
    take_over_pods(&earlier, &order, &console)?;
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

/// Takes over between agents that start their data processes themselves.
fn take_over_agents(first: &Path, order: &Order<'_>, console: &Console) -> Result<()> {
    let mut cluster = prepare(first)?;
    cluster.start()?;
    checks::all_reach_all(&cluster.lab)?;
    for (step, program) in order {
        take_over(&mut cluster, step, program, console, |agent| {
            agent.take_over()?.stop(Duration::from_secs(20)).map(drop)
        })?;
    }
    checks::all_reach_all(&cluster.lab)
}

/// Takes over between pods of the chart: each has an agent and a keeper.
fn take_over_pods(first: &Path, order: &Order<'_>, console: &Console) -> Result<()> {
    let mut cluster = prepare(first)?;
    let mut pod = Instance::start_cluster(&mut cluster, "pod-0")?;
    for (number, (step, program)) in (1..).zip(order) {
        take_over(&mut cluster, step, program, console, |agent| {
            let next = Instance::start(agent, &format!("pod-{number}"))?;
            next.wait_ready()?;
            ensure!(next.has_dataplane(), "the new pod did not take over:\n{}", next.log_tail());
            std::mem::replace(&mut pod, next).delete();
            Ok(())
        })?;
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

/// Sets the program of the first node's agent and runs `replace`, which takes over from the running
/// agent, while pings and a TCP transfer run between the pods. Checks that no ping is lost, and
/// that the second node, which is not replaced, starts no handshake.
fn take_over(
    cluster: &mut Cluster,
    step: &str,
    program: &Path,
    console: &Console,
    replace: impl FnOnce(&mut Agent) -> Result<()>,
) -> Result<()> {
    cluster.agents[0].program = program.to_path_buf();
    let handshakes = cluster.agents[1].initiated_handshakes()?;
    let (from, to) = (cluster.lab.pod(0), cluster.lab.pod(1));
    let (bytes, rate) = TRANSFER;
    let address = (to.address(Family::V4), 7000).into();
    let transfer = Transfer::start(&from.ns, &to.ns, address, bytes, Some(rate))?;
    let loss = checks::pinged_while(&cluster.lab, || {
        thread::sleep(TRAFFIC_MARGIN);
        replace(&mut cluster.agents[0])?;
        thread::sleep(TRAFFIC_MARGIN);
        Ok(())
    })?;
    let pause = transfer.join()?.longest_pause;
    console
        .print(&format!("  {step}: {loss}; longest pause of the transfer {:.0} ms\n", pause * 1e3));
    ensure!(loss.lost == 0, "{step}: {loss}\n{}", cluster.logs());
    ensure!(
        cluster.agents[1].initiated_handshakes()? == handshakes,
        "{step}: the sessions were not taken over\n{}",
        cluster.logs()
    );
    Ok(())
}

//! Skein agents in the laboratory's nodes: configuration, start, take-over, stop and reports.

mod cni;

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use toml::Table;

pub use super::cluster::Cluster;
use super::files;
pub use super::metrics::Metrics;
use super::process::{self, Finished, Process};
pub use super::record::Record;
use super::{Family, Lab, Netns, Node};

/// Maximum time from an agent's start to its readiness; generous, for a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// Default port of the overlay.
pub const PORT: u16 = 51900;

/// Returns the path of the agent's program: `SKEIN_AGENT_BIN`, or `skein-agent` in the directory of
/// this program or in its parent, where cargo puts both.
///
/// # Errors
/// If `SKEIN_AGENT_BIN` is not set and no directory has the program.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("SKEIN_AGENT_BIN") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("finding this program")?;
    let found = own.ancestors().skip(1).take(2).map(|dir| dir.join("skein-agent"));
    found.into_iter().find(|path| path.is_file()).context(
        "no skein-agent in the directory of this program. Build it \
         (cargo build --release -p skein-agent), or set SKEIN_AGENT_BIN.",
    )
}

/// The agent of one node. Its control process is killed when the value is dropped.
#[derive(Debug)]
pub struct Agent {
    /// Node record of this agent.
    pub record: Record,
    /// Path of the program; [`binary`], unless a test sets another.
    pub program: PathBuf,
    /// Configuration, used from the next start on.
    pub config: Table,
    /// Environment variables in addition to the inherited ones.
    pub environment: Vec<(String, String)>,
    /// Shell commands that run before each command of the agent, in the mount namespace that
    /// `ip netns exec` makes for it.
    pub prelude: Option<String>,
    netns: String,
    directory: PathBuf,
    process: Option<Process>,
}

impl Agent {
    /// Writes the key of a new agent and returns the agent, which is not started. `index` is the
    /// number of the agent on its node, from 0.
    ///
    /// # Errors
    /// If a file cannot be written, or if the agent's program is missing or generates no key.
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

    /// Preloads a library of the package `skein-preload` into processes of the agent that start
    /// from now on.
    ///
    /// # Errors
    /// If the library is not built. Cargo builds it with the examples of the workspace, in the
    /// directory `examples` next to that of the calling test.
    pub fn preload(&mut self, name: &str) -> Result<()> {
        let test = std::env::current_exe()?;
        let target = test.ancestors().nth(2).context("the test is in no target directory")?;
        let library = target.join(format!("examples/lib{name}.so"));
        let remedy = "Run: cargo build --release --package skein-preload --examples";
        ensure!(library.is_file(), "{} is missing. {remedy}", library.display());
        self.environment.push(("LD_PRELOAD".to_owned(), library.to_string_lossy().into_owned()));
        Ok(())
    }

    /// Sets one entry of the configuration (`key` or `table.key`), used from the next start on.
    /// Has no effect if `table` is the name of an entry that is not a table.
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

    /// Returns the directory of this agent's configuration, state, sockets and log.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the name of the network namespace in which the agent runs.
    pub fn netns(&self) -> &str {
        &self.netns
    }

    /// Returns the path of the data process's socket.
    pub fn dataplane_socket(&self) -> &str {
        self.text("dataplane", "socket")
    }

    /// Returns the agent's `state_dir`.
    pub fn state_directory(&self) -> PathBuf {
        self.directory.join("state")
    }

    /// Returns an entry of the configuration, or "" if it is absent or not a string.
    ///
    /// # Panics
    /// If the configuration has no such table.
    fn text(&self, table: &str, key: &str) -> &str {
        self.config[table].get(key).and_then(toml::Value::as_str).unwrap_or_default()
    }

    /// Returns the directory of the node records that the agent watches.
    pub fn records_directory(&self) -> PathBuf {
        self.directory.join("nodes.d")
    }

    /// Writes a node record for this agent, and replaces the record of the same name.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn put_record(&self, record: &Record) -> Result<()> {
        let path = self.records_directory().join(format!("{}.toml", record.name));
        files::replace(&path, record.to_toml())
    }

    /// Removes a node record of this agent.
    ///
    /// # Errors
    /// If the agent has no record of this name, or if the file cannot be removed.
    pub fn remove_record(&self, name: &str) -> Result<()> {
        let path = self.records_directory().join(format!("{name}.toml"));
        fs::remove_file(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// Writes the configuration file and returns its path.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_config(&self) -> Result<PathBuf> {
        let path = self.directory.join("agent.toml");
        fs::write(&path, self.config.to_string())?;
        Ok(path)
    }

    /// Writes the configuration file and returns a command that runs `skein-agent` with these
    /// arguments and `--config` inside the node.
    ///
    /// # Errors
    /// If the configuration file cannot be written.
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

    /// Starts the agent and waits until it is ready.
    ///
    /// # Errors
    /// If the agent cannot be started, exits, or is not ready after 20 s; with the end of its log.
    pub fn start(&mut self) -> Result<()> {
        self.launch()?;
        self.wait_ready()
    }

    /// Starts the agent and returns at once.
    ///
    /// # Errors
    /// If the configuration file cannot be written, or if the program cannot be started.
    pub fn launch(&mut self) -> Result<()> {
        let mut command = self.command(&["run"])?;
        self.process = Some(Process::start(&mut command, &self.log())?);
        Ok(())
    }

    /// Starts another agent with `--take-over`, waits until it is ready, and returns the process of
    /// the previous agent.
    ///
    /// # Errors
    /// If no agent runs, if the new agent does not take over within 20 s, or if it is not ready
    /// another 20 s later.
    pub fn take_over(&mut self) -> Result<Process> {
        let previous = self.replace()?;
        self.wait_ready()?;
        Ok(previous)
    }

    /// Does what [`Agent::take_over`] does, but does not wait until the new agent is ready.
    ///
    /// # Errors
    /// If no agent runs, or if the new agent does not take over within 20 s.
    pub fn replace(&mut self) -> Result<Process> {
        let mut command = self.command(&["run", "--take-over"])?;
        let next = Process::start(&mut command, &self.log())?;
        let mut previous = self.process.replace(next).context("agent not started")?;
        let end = Instant::now() + READY_TIMEOUT;
        // Before the take-over, the previous agent answers requests for readiness.
        while previous.exited().is_none() && !is_holding(previous.pid()) {
            if Instant::now() > end {
                bail!("no agent has taken over:\n{}", self.log_tail());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(previous)
    }

    /// Starts a data process for `dataplane.mode = "external"`. Returns the keeper: the parent
    /// process of the data process, which holds the sockets and sessions.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start_dataplane(&self) -> Result<Process> {
        self.dataplane_command(&[])
    }

    /// Starts a data process that takes over from the running one. Returns the keeper of the new
    /// data process.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn take_over_dataplane(&self) -> Result<Process> {
        self.dataplane_command(&["--take-over"])
    }

    fn dataplane_command(&self, more: &[&str]) -> Result<Process> {
        let mut command = std::process::Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(&self.program);
        command.args(["dataplane", "--socket", self.text("dataplane", "socket")]).args(more);
        Process::start(&mut command, &self.log())
    }

    /// Waits until `/readyz` answers 200.
    ///
    /// # Errors
    /// If the agent was not started, exits, or is not ready after 20 s; with the end of its log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + READY_TIMEOUT;
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

    /// Runs `skein-agent run` until it exits, for configurations that it must refuse.
    ///
    /// # Errors
    /// If the program cannot be started, or does not exit within `limit`.
    pub fn run_to_end(&self, limit: Duration) -> Result<Finished> {
        process::finish(&mut self.command(&["run"])?, &[], limit)
    }

    /// Runs a command of `skein-agent` and returns its exit code and output.
    ///
    /// # Errors
    /// If the program cannot be started, or does not exit within 20 s.
    pub fn run_command(&self, arguments: &[&str]) -> Result<Finished> {
        process::finish(&mut self.command(arguments)?, &[], Duration::from_secs(20))
    }

    /// Stops the control process with SIGTERM and returns its exit code.
    ///
    /// # Errors
    /// If the agent was not started, or does not exit within 10 s.
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

    /// Returns the process id of the control process; `None` if it was not started.
    pub fn control_pid(&self) -> Option<i32> {
        self.process.as_ref().map(Process::pid)
    }

    /// Returns the process ids of this agent's data processes, found by their arguments.
    pub fn dataplane_pids(&self) -> Vec<i32> {
        self.find_dataplane(true)
    }

    /// Returns the process ids of the keepers that have a data process. A keeper has none after a
    /// take-over.
    pub fn keeper_pids(&self) -> Vec<i32> {
        let mut keepers = self.find_dataplane(false);
        keepers.retain(|keeper| !process::children(*keeper).is_empty());
        keepers
    }

    /// Finds data processes (`worker`) or keepers by their arguments.
    fn find_dataplane(&self, worker: bool) -> Vec<i32> {
        let socket = self.text("dataplane", "socket");
        let is_ours = |pid: &i32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|&b| b == 0).collect();
            let has = |word: &str| words.contains(&word.as_bytes());
            has("dataplane") && has(socket) && has("--worker") == worker
        };
        super::registry::pids_in(&self.netns).into_iter().filter(is_ours).collect()
    }

    /// Returns the ids of all processes of the agent: control process, keepers, data processes.
    pub fn pids(&self) -> Vec<i32> {
        let dataplane = self.keeper_pids().into_iter().chain(self.dataplane_pids());
        self.control_pid().into_iter().chain(dataplane).collect()
    }

    /// Returns the output of `status -o json`.
    ///
    /// # Errors
    /// If the command fails, or if its output is not JSON.
    pub fn status(&self) -> Result<Value> {
        let finished = self.run_command(&["status", "-o", "json", "--interval", "0"])?;
        if finished.code != 0 {
            bail!("status ended with code {}: {}", finished.code, finished.stderr);
        }
        serde_json::from_str(&finished.stdout).context("status is not JSON")
    }

    /// Returns the data process's report from the status.
    ///
    /// # Errors
    /// If the status cannot be read, or if it has no report because the data process does not
    /// answer.
    pub fn report(&self) -> Result<Value> {
        let mut status = self.status()?;
        let report = status["report"].take();
        if report.is_null() {
            bail!("the status has no report of the data process: {status}");
        }
        Ok(report)
    }

    /// Sends a GET request to the agent's HTTP server.
    ///
    /// # Errors
    /// If the server does not answer within 5 s.
    pub fn http(&self, path: &str) -> Result<crate::load::http::Answer> {
        let mut address: std::net::SocketAddr =
            self.text("metrics", "listen").parse().context("metrics.listen")?;
        if address.ip().is_unspecified() {
            address.set_ip(std::net::Ipv4Addr::LOCALHOST.into());
        }
        let path = path.to_owned();
        Netns::run_in(&self.netns, move || crate::load::http::get(address, &path))?
    }

    /// Returns the agent's metrics.
    ///
    /// # Errors
    /// If the HTTP server does not answer, or answers with a status other than 200.
    pub fn metrics(&self) -> Result<Metrics> {
        let answer = self.http("/metrics")?;
        if answer.status != 200 {
            bail!("/metrics answers {}", answer.status);
        }
        Ok(Metrics(answer.body))
    }

    /// Returns the number of handshakes that the node has started.
    ///
    /// # Errors
    /// Those of [`Agent::metrics`].
    pub fn initiated_handshakes(&self) -> Result<f64> {
        Ok(self.metrics()?.sum("skein_handshakes_total", &["result=\"initiated\""]))
    }

    /// Returns the path of the log file of both processes.
    pub fn log(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// Returns the last 30 lines of the log, after a line with the node's name.
    pub fn log_tail(&self) -> String {
        let tail = process::tail(&self.log(), 30);
        format!("--- end of the log of {}:\n{tail}", self.record.name)
    }

    /// Returns the address of the first endpoint of the agent's record.
    ///
    /// # Errors
    /// If the endpoint is not `address:port`.
    pub fn underlay_address(&self) -> Result<IpAddr> {
        let endpoint: std::net::SocketAddr = self.record.endpoints[0].parse()?;
        Ok(endpoint.ip())
    }
}

/// Returns whether an agent has handed over its role and runs as `skein-agent hold`.
fn is_holding(pid: i32) -> bool {
    let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    words.starts_with(b"skein-agent\0hold\0")
}

/// Writes a new private key to a file with mode 0600 and returns its public key (base64).
///
/// # Errors
/// If the agent's program is missing or fails, or if the file cannot be written.
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

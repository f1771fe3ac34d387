//! The processes of one pod of the chart: an agent and a data plane that take over from those of
//! another pod on the same node.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;

use super::agent::Agent;
use super::checks;
use super::cluster::Cluster;
use super::process::{self, Finished, Process};

/// Maximum time until an instance is ready on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// A container of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Container {
    /// Container that runs `skein-agent run`.
    Agent,
    /// Container that runs `skein-agent dataplane`.
    Dataplane,
}

/// The two processes of a pod; killed when dropped.
#[derive(Debug)]
pub struct Instance {
    directory: PathBuf,
    config: PathBuf,
    socket: String,
    netns: String,
    program: PathBuf,
    log: PathBuf,
    agent: Option<Process>,
    dataplane: Option<Process>,
}

impl Instance {
    /// Prepares a pod on the agent's node with the agent's current configuration, without starting
    /// it.
    ///
    /// # Errors
    /// If the pod's directory or configuration cannot be written.
    pub fn prepare(agent: &Agent, name: &str) -> Result<Self> {
        let directory = agent.directory().join(name);
        fs::create_dir_all(&directory)?;
        let config = directory.join("agent.toml");
        fs::write(&config, agent.config.to_string())?;
        Ok(Self {
            log: directory.join("log"),
            socket: agent.dataplane_socket().to_owned(),
            netns: agent.netns().to_owned(),
            program: agent.program.clone(),
            directory,
            config,
            agent: None,
            dataplane: None,
        })
    }

    /// Starts a cluster of two nodes: the agent and the data plane of the first belong to a pod
    /// with this name, which is returned; the second is an ordinary node. Returns when the pods of
    /// both nodes reach each other.
    ///
    /// # Errors
    /// If an agent cannot be started, is not ready in time, or if a pod does not reach another.
    pub fn start_cluster(cluster: &mut Cluster, name: &str) -> Result<Self> {
        cluster.agents[0].set("dataplane.mode", "external");
        cluster.agents[1].launch()?;
        let pod = Self::start(&cluster.agents[0], name)?;
        pod.wait_ready()?;
        cluster.agents[1].wait_ready()?;
        checks::all_reach_all(&cluster.lab)?;
        Ok(pod)
    }

    /// Prepares a pod and starts both its containers.
    ///
    /// # Errors
    /// If a file cannot be written, or if a container cannot be started.
    pub fn start(agent: &Agent, name: &str) -> Result<Self> {
        let mut instance = Self::prepare(agent, name)?;
        instance.run(Container::Dataplane)?;
        instance.run(Container::Agent)?;
        Ok(instance)
    }

    /// Starts a container. A process of the same container is killed.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn run(&mut self, container: Container) -> Result<()> {
        let instance = format!("--instance={}", self.directory.display());
        let mut command = self.command();
        match container {
            Container::Agent => command.args(["run", "--dataplane=external", "--config"]),
            Container::Dataplane => command.args(["dataplane", "--socket"]),
        };
        match container {
            Container::Agent => command.arg(&self.config),
            Container::Dataplane => command.arg(&self.socket),
        };
        let process = Process::start(command.arg(instance), &self.log)?;
        *self.container(container) = Some(process);
        Ok(())
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.netns]).arg(&self.program);
        command
    }

    fn container(&mut self, container: Container) -> &mut Option<Process> {
        match container {
            Container::Agent => &mut self.agent,
            Container::Dataplane => &mut self.dataplane,
        }
    }

    /// Kills a container (SIGKILL).
    pub fn kill(&mut self, container: Container) {
        *self.container(container) = None;
    }

    /// Stops both containers as kubelet stops a pod: SIGTERM to both, and SIGKILL to a container
    /// that does not exit within 5 s.
    pub fn delete(&mut self) {
        for process in [&self.agent, &self.dataplane].into_iter().flatten() {
            let _ = process.signal(Signal::TERM);
        }
        for container in [Container::Agent, Container::Dataplane] {
            if let Some(mut process) = self.container(container).take() {
                let _ = process.stop(Duration::from_secs(5));
            }
        }
    }

    /// Returns the exit code of a container; `None` if it runs or was not started.
    pub fn exited(&mut self, container: Container) -> Option<i32> {
        self.container(container).as_mut().and_then(Process::exited)
    }

    /// Runs the readiness probe (`ready`) or the liveness probe of the agent's container and
    /// returns its result.
    ///
    /// # Errors
    /// If the probe does not exit within 10 s.
    pub fn probe(&self, ready: bool) -> Result<Finished> {
        let mut command = self.command();
        command.arg("health").arg(format!("--instance={}", self.directory.display()));
        command.args(ready.then_some("--ready"));
        process::finish(&mut command, &[], Duration::from_secs(10))
    }

    /// Runs the probe of the data plane's container and returns its result.
    ///
    /// # Errors
    /// If the probe does not exit within 10 s.
    pub fn probe_dataplane(&self) -> Result<Finished> {
        let mut command = self.command();
        command.args(["dataplane", "--probe", "--socket", &self.socket]);
        command.arg(format!("--instance={}", self.directory.display()));
        process::finish(&mut command, &[], Duration::from_secs(10))
    }

    /// Waits until the readiness probe passes.
    ///
    /// # Errors
    /// If the probe fails for 20 s; with its message and the end of the log.
    pub fn wait_ready(&self) -> Result<()> {
        let end = Instant::now() + READY_TIMEOUT;
        loop {
            let probe = self.probe(true)?;
            if probe.code == 0 {
                return Ok(());
            }
            if Instant::now() > end {
                bail!(
                    "{} is not ready: {}\n{}",
                    self.directory.display(),
                    probe.stderr,
                    self.log_tail()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Returns whether this pod has the data plane.
    pub fn has_dataplane(&self) -> bool {
        self.directory.join("dataplane.active").exists()
    }

    /// Returns the whole log of both containers.
    ///
    /// # Errors
    /// If no container was started.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).context("no log")
    }

    /// Returns the end of the log.
    pub fn log_tail(&self) -> String {
        process::tail(&self.log, 40)
    }
}

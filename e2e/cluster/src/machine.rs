//! Machines of a cluster: namespaces (network, mount, PID, UTS, IPC and cgroup), a disk that
//! outlives a loss of power, and the daemons on the machine.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::programs::Programs;
use skein_lab::process::{self, Process};
use skein_lab::{Netns, UNDERLAY, link, registry};

/// Shell script that creates and enters the namespaces of a machine.
const SCRIPT: &str = include_str!("../machine.sh");

/// Maximum time until a machine runs.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// Maximum time until a daemon, or all processes of a machine, have exited.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);

/// Name of the switch's bridge.
pub(super) const BRIDGE: &str = "br0";

/// Returns the IPv4 address on the underlay of the machine with this number.
pub fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, number)
}

/// Returns the IPv6 address on the underlay of the machine with this number.
pub fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, number.into())
}

/// A machine of a cluster. The machine loses power when the value is dropped, and when the thread
/// that switched the machine on exits.
#[derive(Debug)]
pub struct Machine {
    name: String,
    number: u8,
    /// Directory of the laboratory, which machines see under the same path.
    laboratory: PathBuf,
    /// Value of `PATH` for the machine's programs.
    path: String,
    /// Root directory whose `usr` is mounted over the machine's.
    runtime: Option<PathBuf>,
    switch: Arc<Netns>,
    mtu: u32,
    /// Daemons in the order in which they were added.
    daemons: Vec<Daemon>,
    power: Option<Power>,
}

#[derive(Debug)]
struct Daemon {
    name: &'static str,
    words: Vec<String>,
    process: Option<Process>,
}

/// Processes and network of a machine that is switched on.
#[derive(Debug)]
struct Power {
    /// Process id of the machine's first process, in the host's numbering.
    init: Pid,
    process: Process,
    net: Netns,
}

impl Machine {
    /// Creates a machine that is switched off, with an empty disk. Its addresses are [`v4`] and
    /// [`v6`] of `number`; its `PATH` starts with the directory of `programs`.
    ///
    /// # Errors
    /// If the disk or the script cannot be written.
    pub(super) fn new(
        name: &str,
        number: u8,
        laboratory: &Path,
        programs: &Programs,
        switch: &Arc<Netns>,
        mtu: u32,
    ) -> Result<Self> {
        let script = laboratory.join("machine.sh");
        fs::write(&script, SCRIPT).with_context(|| format!("writing {}", script.display()))?;
        let system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let machine = Self {
            name: name.to_owned(),
            number,
            laboratory: laboratory.to_owned(),
            path: format!("{}:{system}", programs.kubernetes.display()),
            runtime: programs.runtime.clone(),
            switch: Arc::clone(switch),
            mtu,
            daemons: vec![],
            power: None,
        };
        fs::create_dir(machine.disk()).context("cannot create the disk of a machine")?;
        Ok(machine)
    }

    /// Returns the name, which is also the host name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the machine's number, the last part of its underlay addresses.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Returns the MTU of the underlay, bytes.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Returns the machine's network namespace.
    ///
    /// # Errors
    /// If the machine is switched off.
    pub fn net(&self) -> Result<&Netns> {
        Ok(&self.power()?.net)
    }

    fn power(&self) -> Result<&Power> {
        self.power.as_ref().with_context(|| format!("{} is switched off", self.name))
    }

    fn disk(&self) -> PathBuf {
        self.laboratory.join(&self.name)
    }

    /// Returns the path on the host of a directory of the machine's disk, also while the machine is
    /// switched off: `/etc/kubernetes`, `/etc/cni/net.d`, `/opt/cni/bin`, `/var/lib/kubelet` or
    /// `/var/lib/containerd`.
    pub fn disk_path(&self, inside: &str) -> PathBuf {
        self.disk().join(inside.trim_start_matches('/'))
    }

    /// Returns the path on the host of any file of the machine. Absolute symbolic links in `inside`
    /// would lead to the host's files: use `/run`, not `/var/run`.
    ///
    /// # Errors
    /// If the machine is switched off.
    pub fn path(&self, inside: &str) -> Result<PathBuf> {
        let root = PathBuf::from(format!("/proc/{}/root", self.power()?.init.as_raw_nonzero()));
        Ok(root.join(inside.trim_start_matches('/')))
    }

    /// Returns the name of the machine's port at the switch.
    fn port(&self) -> String {
        format!("port{}", self.number)
    }

    /// Switches the machine on, without its daemons.
    ///
    /// # Errors
    /// If the machine is switched on already, if its network cannot be set up, or if it does not
    /// run after 20 s.
    pub(super) fn boot(&mut self) -> Result<()> {
        if self.power.is_some() {
            bail!("{} is switched on already", self.name);
        }
        let net = Netns::create(&self.name)?;
        let port = self.port();
        link::veth((&net, UNDERLAY), (&self.switch, &port), self.mtu)?;
        link::enslave(&self.switch, &port, BRIDGE)?;
        net.ip_batch(&address(self.number))?;
        // The kubelet requests the metadata of a cloud from this address. Without the route, it
        // would wait for an answer.
        net.ip("route add unreachable 169.254.169.254/32")?;
        let mut command = Command::new("sh");
        command.arg(self.laboratory.join("machine.sh")).args(["start", net.name(), &self.name]);
        command.arg(self.disk()).args(&self.runtime).env_clear().env("PATH", &self.path);
        let pid_file = self.disk().join("init.pid");
        let _ = fs::remove_file(&pid_file);
        let mut process = Process::start(&mut command, &self.log_file("machine"))?;
        let end = Instant::now() + START_TIMEOUT;
        let init = loop {
            if let Ok(text) = fs::read_to_string(&pid_file) {
                break Pid::from_raw(text.trim().parse()?).context("no process id")?;
            }
            process.check_alive()?;
            if Instant::now() > end {
                bail!("{} did not start:\n{}", self.name, process.log_tail(30));
            }
            thread::sleep(Duration::from_millis(5));
        };
        self.power = Some(Power { init, process, net });
        Ok(())
    }

    /// Cuts the power: all processes are killed, and files in memory are lost. Has no effect if the
    /// machine is switched off.
    pub fn power_off(&mut self) {
        let Some(mut power) = self.power.take() else { return };
        // The kernel kills all processes of the PID namespace before its first process is gone.
        let _ = kill_process(power.init, Signal::KILL);
        let end = Instant::now() + STOP_TIMEOUT;
        while power.process.exited().is_none() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        for daemon in &mut self.daemons {
            daemon.process = None;
        }
        // The kernel removes the port with the namespace, but asynchronously.
        let _ = self.switch.ip(&format!("link del {}", self.port()));
    }

    /// Returns whether the machine is switched on.
    pub fn is_on(&self) -> bool {
        self.power.is_some()
    }

    /// Plugs or unplugs the machine's cable at the switch.
    ///
    /// # Errors
    /// If the machine is switched off.
    pub fn set_cable(&self, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.switch.ip(&format!("link set {} {state}", self.port())).map(drop)
    }

    /// Changes the machine's number and addresses, without a notification of its daemons.
    ///
    /// # Errors
    /// If the machine is switched off, or if `ip` fails.
    pub(super) fn set_number(&mut self, number: u8) -> Result<()> {
        let net = &self.power()?.net;
        net.ip_batch(&[format!("address flush dev {UNDERLAY} scope global")])?;
        net.ip_batch(&address(number))?;
        let port = format!("port{number}");
        self.switch.ip(&format!("link set {} down name {port}", self.port()))?;
        self.switch.ip(&format!("link set {port} up"))?;
        self.number = number;
        Ok(())
    }

    /// Returns a command that runs in all namespaces of the machine.
    ///
    /// # Errors
    /// If the machine is switched off.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let power = self.power()?;
        let mut command = Command::new("sh");
        command.arg(self.laboratory.join("machine.sh")).args(["enter", power.net.name()]);
        command.arg(power.init.as_raw_nonzero().to_string()).arg(program);
        command.env_clear().env("PATH", &self.path).env("HOME", "/root");
        Ok(command)
    }

    /// Runs a command in the machine and returns its standard output.
    ///
    /// # Errors
    /// If the machine is switched off, or if the command fails or does not exit within 60 s.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = words.split_first().context("empty command")?;
        process::run(self.command(program)?.args(arguments))
    }

    /// Adds a daemon without starting it. It replaces a daemon of the same name.
    pub(super) fn add_daemon(&mut self, name: &'static str, words: Vec<String>) {
        self.daemons.retain(|daemon| daemon.name != name);
        self.daemons.push(Daemon { name, words, process: None });
    }

    /// Replaces the value of a daemon's argument `--option=`, used from its next start on.
    ///
    /// # Errors
    /// If there is no such daemon or argument.
    pub(super) fn set_option(&mut self, name: &str, option: &str, value: &str) -> Result<()> {
        let start = format!("--{option}=");
        let daemon = self.daemon(name)?;
        let word = daemon.words.iter_mut().find(|word| word.starts_with(&start));
        *word.with_context(|| format!("{name} has no {start}"))? = start.clone() + value;
        Ok(())
    }

    fn daemon(&mut self, name: &str) -> Result<&mut Daemon> {
        let found = self.daemons.iter_mut().find(|daemon| daemon.name == name);
        found.with_context(|| format!("no daemon {name}"))
    }

    /// Starts a daemon. The daemon must not be running.
    ///
    /// # Errors
    /// If the machine is switched off, or if the daemon exits at once.
    pub fn start(&mut self, name: &str) -> Result<()> {
        let words = self.daemon(name)?.words.clone();
        let (program, arguments) = words.split_first().context("empty command")?;
        let mut command = self.command(program)?;
        let process = Process::start_inside(command.args(arguments), &self.log_file(name))?;
        self.daemon(name)?.process = Some(process);
        Ok(())
    }

    /// Stops a daemon with SIGTERM and waits until it exits.
    ///
    /// # Errors
    /// If the daemon does not run, or does not exit within 20 s.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let daemon = self.daemon(name)?;
        let process = daemon.process.as_mut().with_context(|| format!("{name} does not run"))?;
        process.stop(STOP_TIMEOUT)?;
        daemon.process = None;
        Ok(())
    }

    /// Kills a daemon (SIGKILL).
    ///
    /// # Errors
    /// If there is no such daemon.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.daemon(name)?.process = None;
        Ok(())
    }

    /// Stops a daemon if it runs, and starts it.
    ///
    /// # Errors
    /// Those of [`Machine::stop`] and [`Machine::start`].
    pub fn restart(&mut self, name: &str) -> Result<()> {
        if self.pid(name)?.is_some() {
            self.stop(name)?;
        }
        self.start(name)
    }

    /// Returns the process id of a daemon in the host's numbering; `None` if it does not run.
    ///
    /// # Errors
    /// If there is no such daemon.
    pub fn pid(&mut self, name: &str) -> Result<Option<i32>> {
        let running = |process: &mut Process| process.exited().is_none().then(|| process.pid());
        Ok(self.daemon(name)?.process.as_mut().and_then(running))
    }

    /// Checks that no started daemon has exited by itself.
    ///
    /// # Errors
    /// If a daemon has exited; with the end of its log.
    pub fn check_daemons(&mut self) -> Result<()> {
        let mut processes = self.daemons.iter_mut().filter_map(|daemon| daemon.process.as_mut());
        processes.try_for_each(Process::check_alive)
    }

    /// Returns the path of a daemon's log.
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.laboratory.join(format!("{}.{name}.log", self.name))
    }

    /// Returns the ends of all daemons' logs.
    pub fn logs(&self) -> String {
        let one = |daemon: &Daemon| {
            let text = process::tail(&self.log_file(daemon.name), 15);
            format!("--- {} on {}\n{text}\n", daemon.name, self.name)
        };
        self.daemons.iter().map(one).collect()
    }

    /// Returns the beginning of a shell command. The caller appends a command, which the shell then
    /// runs inside the machine.
    ///
    /// # Errors
    /// If the machine is switched off.
    pub fn entrance(&self) -> Result<String> {
        let power = self.power()?;
        let (script, init) = (self.laboratory.join("machine.sh"), power.init.as_raw_nonzero());
        Ok(format!("sh {} enter {} {init}", script.display(), power.net.name()))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.power_off();
        registry::remove_directory(&self.disk());
    }
}

/// Returns the arguments of `ip` that set the addresses and routes of the underlay interface.
fn address(number: u8) -> [String; 4] {
    [
        format!("address add {}/24 dev {UNDERLAY}", v4(number)),
        format!("address add {}/64 dev {UNDERLAY} nodad", v6(number)),
        format!("route replace default via {} dev {UNDERLAY}", v4(1)),
        format!("route replace default via {} dev {UNDERLAY}", v6(1)),
    ]
}

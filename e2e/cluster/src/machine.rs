//! A machine of a cluster: namespaces of every kind, a disk that outlives a loss of power, and the
//! daemons that run on it.

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

/// What makes the namespaces and enters them.
const SCRIPT: &str = include_str!("../machine.sh");

/// How long a machine may take to be there.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long the kernel may take to end all that runs inside.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// The bridge that is the switch.
pub(super) const BRIDGE: &str = "br0";

/// The underlay's address of this host number.
pub fn v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 30, 0, number)
}

/// The same of the other family.
pub fn v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, number.into())
}

/// A machine; it loses power when dropped. It ends too when the thread ends that switched it on.
#[derive(Debug)]
pub struct Machine {
    name: String,
    number: u8,
    /// Directory of the laboratory, which machines see under the same name.
    laboratory: PathBuf,
    /// Where programs are found.
    path: String,
    /// Root directory whose `usr` is mounted over the machine's.
    runtime: Option<PathBuf>,
    switch: Arc<Netns>,
    mtu: u32,
    /// In the order of their start.
    daemons: Vec<Daemon>,
    power: Option<Power>,
}

#[derive(Debug)]
struct Daemon {
    name: &'static str,
    words: Vec<String>,
    process: Option<Process>,
}

/// What a machine is while it is switched on.
#[derive(Debug)]
struct Power {
    /// The first process, as the host numbers it.
    init: Pid,
    process: Process,
    net: Netns,
}

impl Machine {
    /// One that is switched off. Its addresses are [`v4`] and [`v6`] of `number`; its programs are
    /// `programs`, beside the usual places.
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
        fs::create_dir(machine.disk()).context("making a machine's disk")?;
        Ok(machine)
    }

    /// Its name, which is its host name too.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The last part of its underlay addresses.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// MTU of the underlay.
    pub fn mtu(&self) -> u32 {
        self.mtu
    }

    /// Its network, for what a [`Netns`] can do; an error while it is switched off.
    pub fn net(&self) -> Result<&Netns> {
        Ok(&self.power()?.net)
    }

    fn power(&self) -> Result<&Power> {
        self.power.as_ref().with_context(|| format!("{} is switched off", self.name))
    }

    fn disk(&self) -> PathBuf {
        self.laboratory.join(&self.name)
    }

    /// The way from here to a directory of its disk: `/etc/kubernetes`, `/etc/cni/net.d`,
    /// `/opt/cni/bin`, `/var/lib/kubelet` and `/var/lib/containerd`, also while it is switched off.
    pub fn disk_path(&self, inside: &str) -> PathBuf {
        self.disk().join(inside.trim_start_matches('/'))
    }

    /// The way from here to any of its files. Links to absolute paths lead out of it: `/run`, not
    /// `/var/run`.
    pub fn path(&self, inside: &str) -> Result<PathBuf> {
        let root = PathBuf::from(format!("/proc/{}/root", self.power()?.init.as_raw_nonzero()));
        Ok(root.join(inside.trim_start_matches('/')))
    }

    /// Its port of the switch.
    fn port(&self) -> String {
        format!("port{}", self.number)
    }

    /// Switches it on; no daemon runs yet.
    pub(super) fn boot(&mut self) -> Result<()> {
        if self.power.is_some() {
            bail!("{} is switched on already", self.name);
        }
        let net = Netns::create(&self.name)?;
        let port = self.port();
        link::veth((&net, UNDERLAY), (&self.switch, &port), self.mtu)?;
        link::enslave(&self.switch, &port, BRIDGE)?;
        net.ip_batch(&address(self.number))?;
        // Here a kubelet asks what cloud it runs in, and waits long for no answer.
        net.ip("route add unreachable 169.254.169.254/32")?;
        let mut command = Command::new("sh");
        command.arg(self.laboratory.join("machine.sh")).args(["start", net.name(), &self.name]);
        command.arg(self.disk()).args(&self.runtime).env_clear().env("PATH", &self.path);
        let pid_file = self.disk().join("init.pid");
        let _ = fs::remove_file(&pid_file);
        let mut process = Process::start(&mut command, &self.log_file("machine"))?;
        let end = Instant::now() + START_LIMIT;
        let init = loop {
            if let Ok(text) = fs::read_to_string(&pid_file) {
                break Pid::from_raw(text.trim().parse()?).context("no process id")?;
            }
            process.check_alive()?;
            if Instant::now() > end {
                bail!("{} does not come up:\n{}", self.name, process.log_tail(30));
            }
            thread::sleep(Duration::from_millis(5));
        };
        self.power = Some(Power { init, process, net });
        Ok(())
    }

    /// Takes the power away: everything that runs ends at once, and what was in memory is lost.
    pub fn power_off(&mut self) {
        let Some(mut power) = self.power.take() else { return };
        // The kernel ends all others with it, and only then is it gone.
        let _ = kill_process(power.init, Signal::KILL);
        let end = Instant::now() + STOP_LIMIT;
        while power.process.exited().is_none() && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        for daemon in &mut self.daemons {
            daemon.process = None;
        }
        // Goes with the namespace too, but some time later.
        let _ = self.switch.ip(&format!("link del {}", self.port()));
    }

    /// Whether it is switched on.
    pub fn is_on(&self) -> bool {
        self.power.is_some()
    }

    /// Takes its cable out of the switch, or puts it in again.
    pub fn set_cable(&self, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.switch.ip(&format!("link set {} {state}", self.port())).map(drop)
    }

    /// Gives it other addresses; what runs on it is not told.
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

    /// A command that will run inside, in all its namespaces.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let power = self.power()?;
        let mut command = Command::new("sh");
        command.arg(self.laboratory.join("machine.sh")).args(["enter", power.net.name()]);
        command.arg(power.init.as_raw_nonzero().to_string()).arg(program);
        command.env_clear().env("PATH", &self.path).env("HOME", "/root");
        Ok(command)
    }

    /// Runs a command inside, which must succeed within a minute; what it wrote to standard output.
    pub fn exec(&self, words: &[&str]) -> Result<String> {
        let (program, arguments) = words.split_first().context("empty command")?;
        process::run(self.command(program)?.args(arguments))
    }

    /// Adds a daemon, which is not started yet.
    pub(super) fn add_daemon(&mut self, name: &'static str, words: Vec<String>) {
        self.daemons.retain(|daemon| daemon.name != name);
        self.daemons.push(Daemon { name, words, process: None });
    }

    /// Replaces a daemon's argument that starts with `--option=`; in force from its next start.
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

    /// Starts a daemon.
    pub fn start(&mut self, name: &str) -> Result<()> {
        let words = self.daemon(name)?.words.clone();
        let (program, arguments) = words.split_first().context("empty command")?;
        let mut command = self.command(program)?;
        let process = Process::start_inside(command.args(arguments), &self.log_file(name))?;
        self.daemon(name)?.process = Some(process);
        Ok(())
    }

    /// Asks a daemon to end (SIGTERM) and waits for it.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let daemon = self.daemon(name)?;
        let process = daemon.process.as_mut().with_context(|| format!("{name} does not run"))?;
        process.stop(STOP_LIMIT)?;
        daemon.process = None;
        Ok(())
    }

    /// Kills a daemon (SIGKILL).
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.daemon(name)?.process = None;
        Ok(())
    }

    /// Stops a daemon, if it still runs, and starts it.
    pub fn restart(&mut self, name: &str) -> Result<()> {
        if self.pid(name)?.is_some() {
            self.stop(name)?;
        }
        self.start(name)
    }

    /// Process id of a daemon, as the host numbers it, while it runs.
    pub fn pid(&mut self, name: &str) -> Result<Option<i32>> {
        let running = |process: &mut Process| process.exited().is_none().then(|| process.pid());
        Ok(self.daemon(name)?.process.as_mut().and_then(running))
    }

    /// Fails with the end of its log if a daemon has ended of itself.
    pub fn check_daemons(&mut self) -> Result<()> {
        let mut processes = self.daemons.iter_mut().filter_map(|daemon| daemon.process.as_mut());
        processes.try_for_each(Process::check_alive)
    }

    /// What a daemon writes.
    pub fn log_file(&self, name: &str) -> PathBuf {
        self.laboratory.join(format!("{}.{name}.log", self.name))
    }

    /// The ends of all daemons' logs.
    pub fn logs(&self) -> String {
        let one = |daemon: &Daemon| {
            let text = process::tail(&self.log_file(daemon.name), 15);
            format!("--- {} on {}\n{text}\n", daemon.name, self.name)
        };
        self.daemons.iter().map(one).collect()
    }

    /// As a person would type it: the words before a command that is to run inside.
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

/// What gives the underlay's interface its addresses and routes.
fn address(number: u8) -> [String; 4] {
    [
        format!("address add {}/24 dev {UNDERLAY}", v4(number)),
        format!("address add {}/64 dev {UNDERLAY} nodad", v6(number)),
        format!("route replace default via {} dev {UNDERLAY}", v4(1)),
        format!("route replace default via {} dev {UNDERLAY}", v6(1)),
    ]
}

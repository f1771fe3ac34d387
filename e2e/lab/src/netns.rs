//! A named network namespace that is removed with everything in it when its value is dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::fd::AsFd as _;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::process;
use super::registry;

/// A network namespace of ours.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes a namespace with the loopback up; `label` becomes part of its name.
    pub fn create(label: &str) -> Result<Self> {
        let name = registry::register_namespace(label)?;
        let netns = Self { name };
        process::run(Command::new("ip").args(["netns", "add", &netns.name]))
            .context("making a network namespace (this needs root)")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is found in the file system.
    pub fn path(&self) -> PathBuf {
        Path::new(registry::NETNS_DIR).join(&self.name)
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command line (split at spaces) inside and returns what it wrote to standard output.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().context("empty command")?);
        command.args(words);
        process::run(&mut command)
    }

    /// Runs `ip` with these arguments (split at spaces) for this namespace.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let words = arguments.split_whitespace();
        process::run(Command::new("ip").args(["-n", &self.name]).args(words))
    }

    /// Changes the firewall inside, in one transaction of `nft` commands, one a line.
    pub fn nft(&self, text: &str) -> Result<()> {
        let mut command = self.command("nft");
        process::run_with_input(command.args(["-f", "-"]), text.as_bytes()).map(drop)
    }

    /// Runs several `ip` commands, one a line, in one process.
    pub fn ip_batch(&self, lines: &[String]) -> Result<()> {
        let input = lines.join("\n") + "\n";
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        process::run_with_input(&mut command, input.as_bytes()).map(drop).context(input)
    }

    /// Sets a kernel setting of this namespace, such as `net.ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::write(&path, value))?.with_context(|| format!("setting {key} to {value}"))
    }

    /// Runs `work` on a thread of its own inside the namespace and waits for it. Sockets opened
    /// there belong to the namespace for good.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        Self::run_in(&self.name, work)
    }

    /// The same for a namespace that somebody else holds.
    pub fn run_in<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| enter(name).map(|()| work()));
            thread.join().map_err(|panic| anyhow!("{}", panic_text(&*panic)))?
        })
    }

    /// Starts `work` on a thread of its own inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Task<T> {
        let name = self.name.clone();
        Task(thread::spawn(move || enter(&name).and_then(|()| work())))
    }

    /// Processes that run inside.
    pub fn pids(&self) -> Vec<i32> {
        registry::pids_in(&self.name)
    }

    /// Names of the interfaces.
    pub fn interfaces(&self) -> Result<Vec<String>> {
        let text = self.ip("-o link show")?;
        let name = |line: &str| {
            let name = line.split(": ").nth(1)?;
            Some(name.split('@').next()?.to_owned())
        };
        Ok(text.lines().filter_map(name).collect())
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        registry::remove_namespace(&self.name);
    }
}

/// Work under way on another thread.
pub struct Task<T>(JoinHandle<Result<T>>);

impl<T> Task<T> {
    /// Waits for its end.
    pub fn join(self) -> Result<T> {
        self.0.join().map_err(|panic| anyhow!("{}", panic_text(&*panic)))?
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

fn enter(name: &str) -> Result<()> {
    let path = Path::new(registry::NETNS_DIR).join(name);
    let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    match move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)) {
        Ok(()) => Ok(()),
        Err(error) => bail!("entering namespace {name}: {error}"),
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}

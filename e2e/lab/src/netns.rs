//! Named network namespaces. Dropping a value kills all processes in its namespace and removes the
//! namespace.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow, bail};
use rustix::fd::AsFd as _;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::process;
use super::registry;

/// A named network namespace, which exists as long as the value.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates a namespace and sets its loopback interface up. `label` is the end of its name.
    ///
    /// # Errors
    /// If the process does not run as root, or if a signal has started the cleanup.
    pub fn create(label: &str) -> Result<Self> {
        let name = registry::register_namespace(label)?;
        let netns = Self { name };
        process::run(Command::new("ip").args(["netns", "add", &netns.name]))
            .context("cannot create a network namespace. Run this as root.")?;
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Returns the name for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the namespace in the file system.
    pub fn path(&self) -> PathBuf {
        Path::new(registry::NETNS_DIR).join(&self.name)
    }

    /// Returns a command that runs `program` in the namespace.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command line in the namespace and returns its standard output. The line is split at
    /// spaces; no shell interprets it.
    ///
    /// # Errors
    /// If the command cannot be started, does not exit within 60 s, or exits with a code other than
    /// 0.
    pub fn sh(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().context("empty command")?);
        command.args(words);
        process::run(&mut command)
    }

    /// Runs `ip` with `arguments`, split at spaces, for this namespace and returns its output.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        let words = arguments.split_whitespace();
        process::run(Command::new("ip").args(["-n", &self.name]).args(words))
    }

    /// Runs `nft` commands, one per line, in one transaction.
    ///
    /// # Errors
    /// If `nft` refuses a command; nothing is changed then.
    pub fn nft(&self, text: &str) -> Result<()> {
        let mut command = self.command("nft");
        process::run_with_input(command.args(["-f", "-"]), text.as_bytes()).map(drop)
    }

    /// Runs several `ip` commands, one per line, in one process.
    ///
    /// # Errors
    /// If a command fails; later commands are not run.
    pub fn ip_batch(&self, lines: &[String]) -> Result<()> {
        let input = lines.join("\n") + "\n";
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        process::run_with_input(&mut command, input.as_bytes()).map(drop).context(input)
    }

    /// Sets a kernel setting of this namespace, such as `net.ipv4.ip_forward`.
    ///
    /// # Errors
    /// If the kernel has no such setting, or refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key.replace('.', "/"));
        self.run(|| fs::write(&path, value))?.with_context(|| format!("setting {key} to {value}"))
    }

    /// Runs `work` on a new thread in the namespace and returns its result. Sockets that `work`
    /// opens stay in the namespace.
    ///
    /// # Errors
    /// If the thread cannot enter the namespace, or if `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        Self::run_in(&self.name, work)
    }

    /// Runs `work` as [`Netns::run`] does, in the namespace of this name.
    ///
    /// # Errors
    /// If there is no such namespace, or if `work` panics.
    pub fn run_in<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| enter(name).map(|()| work()));
            thread.join().map_err(|panic| anyhow!("{}", panic_text(&*panic)))?
        })
    }

    /// Starts `work` on a new thread in the namespace. [`Task::join`] returns its result.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Task<T> {
        let name = self.name.clone();
        Task(thread::spawn(move || enter(&name).and_then(|()| work())))
    }

    /// Returns the ids of the processes in the namespace, except for this process.
    pub fn pids(&self) -> Vec<i32> {
        registry::pids_in(&self.name)
    }

    /// Returns the names of the namespace's interfaces.
    ///
    /// # Errors
    /// If `ip` fails.
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

/// A function that runs on another thread.
pub struct Task<T>(JoinHandle<Result<T>>);

impl<T> Task<T> {
    /// Waits for the end of the function and returns its result.
    ///
    /// # Errors
    /// If the thread could not enter the namespace, or if the function returned an error or
    /// panicked.
    pub fn join(self) -> Result<T> {
        self.0.join().map_err(|panic| anyhow!("{}", panic_text(&*panic)))?
    }

    /// Returns whether the function has returned or panicked.
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

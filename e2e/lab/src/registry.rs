//! Cleanup of everything that this process makes on the host: network namespaces with their
//! processes, cgroups, files, and changed kernel settings. The cleanup runs when values are dropped
//! and on SIGINT, SIGTERM and SIGHUP; after SIGKILL, the next run does it ([`sweep`]).

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::cgroup;

/// Directory in which iproute2 keeps named namespaces.
pub(super) const NETNS_DIR: &str = "/run/netns";

/// Prefix of all names of laboratories. The process id of the owner follows.
const PREFIX: &str = "skein-e2e-";

/// Directory of the laboratories' files. Only root can write to it, so that no other user can plant
/// a file.
const HOME: &str = "/run/skein-e2e";

/// Suffix of the name of the file with the previous values of changed kernel settings.
const SETTINGS_SUFFIX: &str = "host-settings";

/// Kernel settings of the host that [`set_host`] may change.
const HOST_KEYS: [&str; 4] =
    ["net.core.rmem_default", "net.core.rmem_max", "net.core.wmem_default", "net.core.wmem_max"];

#[derive(Default)]
struct CleanupRegistry {
    namespaces: Vec<String>,
    /// Directories and files to remove.
    paths: Vec<PathBuf>,
    /// Previous values of changed kernel settings by key.
    settings: BTreeMap<&'static str, String>,
}

static REGISTRY: Mutex<CleanupRegistry> =
    Mutex::new(CleanupRegistry { namespaces: vec![], paths: vec![], settings: BTreeMap::new() });
static CLOSING: AtomicBool = AtomicBool::new(false);
static PREPARE: Once = Once::new();

fn registry() -> MutexGuard<'static, CleanupRegistry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes leftovers of dead processes ([`sweep`]), and starts a thread that waits for SIGINT,
/// SIGTERM or SIGHUP. When a signal arrives, the thread removes everything that this process has
/// made. Only the first call in a process has an effect.
pub fn prepare() {
    PREPARE.call_once(|| {
        sweep();
        let Ok(mut signals) = Signals::new([SIGINT, SIGTERM, SIGHUP]) else { return };
        thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                CLOSING.store(true, Ordering::SeqCst);
                remove_everything();
                std::process::exit(128 + signal);
            }
        });
    });
}

/// Returns a name for a new namespace and registers it for removal.
///
/// # Errors
/// If a signal has already started the cleanup.
pub(super) fn register_namespace(label: &str) -> Result<String> {
    prepare();
    let mut registry = registry();
    if CLOSING.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    let base = format!("{PREFIX}{}-{label}", std::process::id());
    let taken = |name: &String| registry.namespaces.contains(name);
    let name = std::iter::once(base.clone())
        .chain((2..).map(|n| format!("{base}.{n}")))
        .find(|name| !taken(name))
        .context("no unused name for a namespace")?;
    registry.namespaces.push(name.clone());
    Ok(name)
}

/// Kills all processes in a namespace and removes the namespace.
pub(super) fn remove_namespace(name: &str) {
    delete_namespace(name);
    registry().namespaces.retain(|n| n != name);
}

/// Returns the directory of the laboratories' files. Creates it if it is missing.
///
/// # Errors
/// If the directory cannot be created, or if a user other than root can write to it.
pub(super) fn home() -> Result<&'static Path> {
    let home = Path::new(HOME);
    if let Err(error) = fs::DirBuilder::new().mode(0o700).create(home)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(error).with_context(|| format!("creating {HOME}"));
    }
    let found =
        fs::symlink_metadata(home).with_context(|| format!("reading the metadata of {HOME}"))?;
    if !found.is_dir() || found.uid() != 0 || found.mode() & 0o022 != 0 {
        bail!("{HOME} is not a directory that only root can write to. Remove it.");
    }
    Ok(home)
}

/// Creates an empty directory and registers it for removal.
///
/// # Errors
/// If the directory cannot be created.
pub fn directory(label: &str) -> Result<PathBuf> {
    prepare();
    let path = home()?.join(format!("{PREFIX}{}-{label}", std::process::id()));
    let path = (1..).map(|n| path.with_extension(n.to_string())).find(|p| !p.exists());
    let path = path.context("no unused name for a directory")?;
    let mut registry = registry();
    fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
    registry.paths.push(path.clone());
    Ok(path)
}

/// Registers a file for removal if a signal ends this process. Without a signal, the caller removes
/// the file with [`remove_file`].
pub fn register_file(path: &Path) {
    prepare();
    registry().paths.push(path.to_owned());
}

/// Removes a file that was registered with [`register_file`].
pub fn remove_file(path: &Path) {
    let _ = fs::remove_file(path);
    registry().paths.retain(|p| p != path);
}

/// Removes a directory that [`directory`] created, with its content.
pub fn remove_directory(path: &Path) {
    let _ = fs::remove_dir_all(path);
    registry().paths.retain(|p| p != path);
}

/// Changes a kernel setting of the host (a key of sysctl(8)) until [`restore_settings`]. The
/// previous value is also written to a file, from which the next run restores it if this process is
/// killed.
///
/// # Errors
/// If the laboratory may not change this setting, or if it cannot be read or written.
pub fn set_host(key: &str, value: &str) -> Result<()> {
    prepare();
    let key = HOST_KEYS.into_iter().find(|known| *known == key);
    let key = key.context("not a setting that the laboratory may change")?;
    let mut registry = registry();
    let old = fs::read_to_string(setting(key)).with_context(|| format!("reading {key}"))?;
    registry.settings.entry(key).or_insert(old);
    let list = registry.settings.iter().map(|(key, value)| format!("{key}={}\n", value.trim()));
    fs::write(settings_file(std::process::id())?, list.collect::<String>())
        .context("saving the host's settings")?;
    fs::write(setting(key), value).with_context(|| format!("setting {key} to {value}"))
}

fn setting(key: &str) -> PathBuf {
    Path::new("/proc/sys").join(key.replace('.', "/"))
}

fn settings_file(pid: u32) -> Result<PathBuf> {
    Ok(home()?.join(format!("{PREFIX}{pid}-{SETTINGS_SUFFIX}")))
}

/// Restores the settings from the file of a dead process and removes the file.
fn restore_from(file: &Path) {
    let text = fs::read_to_string(file).unwrap_or_default();
    for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
        if HOST_KEYS.contains(&key) {
            let _ = fs::write(setting(key), value);
        }
    }
    let _ = fs::remove_file(file);
}

/// Restores every setting that [`set_host`] changed.
pub fn restore_settings() {
    let settings = std::mem::take(&mut registry().settings);
    if settings.is_empty() {
        return;
    }
    for (key, value) in settings {
        if let Err(error) = fs::write(setting(key), value.trim()) {
            eprintln!("cannot restore {key}: {error}");
        }
    }
    if let Ok(file) = settings_file(std::process::id()) {
        let _ = fs::remove_file(file);
    }
}

fn remove_everything() {
    restore_settings();
    // The lock is never released: other threads that create or remove something wait until the
    // exit.
    let registry = registry();
    for name in registry.namespaces.iter().rev() {
        delete_namespace(name);
    }
    for path in &registry.paths {
        let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
    }
    std::mem::forget(registry);
}

/// Removes everything that laboratories of dead processes left on the host, and returns the
/// names of the removed items.
pub fn sweep() -> Vec<String> {
    let mut removed = vec![];
    if let Err(error) = home() {
        eprintln!("{error:#}");
        return removed;
    }
    for name in cgroup::names(PREFIX).into_iter().filter(|name| is_abandoned(name)) {
        delete_namespace(&name);
        removed.push(name);
    }
    for (directory, is_namespace) in [(NETNS_DIR, true), (HOME, false)] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_abandoned(&name) {
                if is_namespace {
                    delete_namespace(&name);
                } else if name.ends_with(SETTINGS_SUFFIX) {
                    restore_from(&entry.path());
                } else {
                    let _ = fs::remove_dir_all(entry.path());
                }
                removed.push(name);
            }
        }
    }
    removed
}

/// Returns whether a name belongs to a laboratory whose process does not exist any more.
fn is_abandoned(name: &str) -> bool {
    let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

/// Returns the names that [`sweep`] would remove. Names of running processes are not among them.
pub fn abandoned() -> Vec<String> {
    existing().into_iter().filter(|name| is_abandoned(name)).collect()
}

/// Returns the names of all namespaces, cgroups and directories of laboratories on this host, of
/// running and of dead processes.
pub fn existing() -> Vec<String> {
    let names = |directory: &Path| {
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect::<Vec<_>>()
    };
    let mut all = names(Path::new(NETNS_DIR));
    all.extend(names(Path::new(HOME)));
    all.retain(|name| name.starts_with(PREFIX));
    all.extend(cgroup::names(PREFIX));
    // A machine's cgroup has the name of its namespace.
    all.sort();
    all.dedup();
    all
}

/// Kills all processes in a namespace, removes the namespace and the cgroups of its name.
fn delete_namespace(name: &str) {
    if Path::new(NETNS_DIR).join(name).exists() {
        delete_network(name);
    }
    cgroup::remove(name);
}

fn delete_network(name: &str) {
    for _ in 0..50 {
        let pids = pids_in(name);
        if pids.is_empty() {
            break;
        }
        for pid in pids {
            if let Some(pid) = Pid::from_raw(pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    match Command::new("ip").args(["netns", "delete", name]).output() {
        Ok(output) if !output.status.success() => {
            eprint!("{}", String::from_utf8_lossy(&output.stderr));
        }
        Err(error) => eprintln!("cannot remove namespace {name}: {error}"),
        Ok(_) => {}
    }
}

/// Returns the ids of the processes in a namespace, except for this process. Zombies have left
/// their namespaces and are not listed.
pub(super) fn pids_in(name: &str) -> Vec<i32> {
    let Ok(wanted) = fs::metadata(Path::new(NETNS_DIR).join(name)) else { return vec![] };
    let own = std::process::id() as i32;
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| pid != own)
        .filter(|pid| {
            fs::metadata(format!("/proc/{pid}/ns/net"))
                .is_ok_and(|m| m.ino() == wanted.ino() && m.dev() == wanted.dev())
        })
        .collect()
}

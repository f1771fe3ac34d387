//! cgroups of the laboratory's machines: names, removal, and a memory limit for one process.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Directory in which the cgroup hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// Maximum time between the kill of a cgroup's processes and the removal of the cgroup, which the
/// kernel refuses until the processes have exited.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the mounted hierarchies: one of cgroup version 2, or one per controller of version 1.
fn hierarchies() -> Vec<PathBuf> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return vec![ROOT.into()];
    }
    directories(Path::new(ROOT))
}

/// Returns the directories in a directory, without symbolic links.
fn directories(of: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Returns the names of top-level cgroups of all hierarchies that start with `prefix`.
pub(super) fn names(prefix: &str) -> BTreeSet<String> {
    let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
    let all = hierarchies();
    let all = all.iter().flat_map(|hierarchy| directories(hierarchy));
    all.filter_map(|path| name(&path)).filter(|name| name.starts_with(prefix)).collect()
}

/// Removes the cgroups of this name and all cgroups below them. The caller has killed their
/// processes. A cgroup that cannot be removed within 30 s is reported on standard error.
pub fn remove(name: &str) {
    let end = Instant::now() + REMOVE_TIMEOUT;
    for cgroup in hierarchies().iter().map(|hierarchy| hierarchy.join(name)) {
        while cgroup.exists() && !remove_tree(&cgroup) {
            if Instant::now() > end {
                eprintln!("cannot remove {}", cgroup.display());
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A memory limit for one process, in a cgroup that is removed together with the namespace of the
/// same name.
#[derive(Debug)]
pub struct MemoryLimit {
    directory: PathBuf,
}

impl MemoryLimit {
    /// Moves a process into a new cgroup with a limit of `bytes`. Memory that the process uses
    /// already does not count.
    ///
    /// # Errors
    /// If the process does not run as root, or if the kernel has no memory controller.
    pub fn new(name: &str, pid: i32, bytes: u64) -> Result<Self> {
        let unified = Path::new(ROOT).join("cgroup.controllers").exists();
        let (directory, limit) = match unified {
            true => {
                fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+memory")
                    .context("cannot enable the memory controller of cgroups")?;
                (Path::new(ROOT).join(name), "memory.max")
            }
            false => (Path::new(ROOT).join("memory").join(name), "memory.limit_in_bytes"),
        };
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot create {}. Run this as root.", directory.display()))?;
        fs::write(directory.join(limit), bytes.to_string())?;
        fs::write(directory.join("cgroup.procs"), pid.to_string())?;
        Ok(Self { directory })
    }

    /// Returns the number of processes that the kernel killed because of the limit.
    ///
    /// # Errors
    /// If the kernel does not count them (`oom_kill`).
    pub fn kills(&self) -> Result<u64> {
        let files = ["memory.events", "memory.oom_control"].map(|name| self.directory.join(name));
        let file = files.iter().find(|file| file.exists()).context("no file with oom_kill")?;
        let text = fs::read_to_string(file)?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.context("no field oom_kill")?.trim().parse().context("oom_kill is not a number")
    }
}

/// Removes a cgroup and those below it, the deepest first, and returns whether all are removed. The
/// kernel removes the files in a cgroup together with the directory.
fn remove_tree(cgroup: &Path) -> bool {
    directories(cgroup).iter().all(|below| remove_tree(below)) && fs::remove_dir(cgroup).is_ok()
}

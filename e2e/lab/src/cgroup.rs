//! The cgroups of the laboratory's machines: their names, how they go, and a limit of memory.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Where the hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// How long the kernel may take to let go of a cgroup whose last process was killed.
const EMPTY_LIMIT: Duration = Duration::from_secs(30);

/// The mounted hierarchies: one of version 2, or one a controller of version 1.
fn hierarchies() -> Vec<PathBuf> {
    if Path::new(ROOT).join("cgroup.controllers").exists() {
        return vec![ROOT.into()];
    }
    directories(Path::new(ROOT))
}

/// Directories inside a directory; not what links lead to.
fn directories(of: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(of).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Names of the cgroups at the top of any hierarchy that start with `prefix`.
pub(super) fn names(prefix: &str) -> BTreeSet<String> {
    let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
    let all = hierarchies();
    let all = all.iter().flat_map(|hierarchy| directories(hierarchy));
    all.filter_map(|path| name(&path)).filter(|name| name.starts_with(prefix)).collect()
}

/// Removes the cgroups of this name with all below them. Their processes have been killed.
pub fn remove(name: &str) {
    let end = Instant::now() + EMPTY_LIMIT;
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

/// A process that may not use more memory than it has, and a little. Gone with the namespace of its name.
#[derive(Debug)]
pub struct MemoryLimit {
    directory: PathBuf,
}

impl MemoryLimit {
    /// Lets a process have so many bytes beside those that it has touched already.
    pub fn new(name: &str, pid: i32, bytes: u64) -> Result<Self> {
        let unified = Path::new(ROOT).join("cgroup.controllers").exists();
        let (directory, limit) = match unified {
            true => {
                fs::write(Path::new(ROOT).join("cgroup.subtree_control"), "+memory")
                    .context("giving cgroups the controller of memory")?;
                (Path::new(ROOT).join(name), "memory.max")
            }
            false => (Path::new(ROOT).join("memory").join(name), "memory.limit_in_bytes"),
        };
        fs::create_dir_all(&directory)
            .with_context(|| format!("making {} (this needs root)", directory.display()))?;
        fs::write(directory.join(limit), bytes.to_string())?;
        fs::write(directory.join("cgroup.procs"), pid.to_string())?;
        Ok(Self { directory })
    }

    /// How often the kernel has killed somebody for it.
    pub fn kills(&self) -> Result<u64> {
        let files = ["memory.events", "memory.oom_control"].map(|name| self.directory.join(name));
        let file = files.iter().find(|file| file.exists()).context("no count of kills")?;
        let text = fs::read_to_string(file)?;
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.context("no count of kills")?.trim().parse().context("no number")
    }
}

/// The files in there are the kernel's: only directories are removed, the deepest first.
fn remove_tree(cgroup: &Path) -> bool {
    directories(cgroup).iter().all(|below| remove_tree(below)) && fs::remove_dir(cgroup).is_ok()
}

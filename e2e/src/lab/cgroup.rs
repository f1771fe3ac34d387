//! The cgroups of the laboratory's machines: their names, and how they go.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// Where the hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";

/// How long the kernel may take to let go of a cgroup whose last process was killed.
const EMPTY_LIMIT: Duration = Duration::from_secs(2);

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

/// The files in there are the kernel's: only directories are removed, the deepest first.
fn remove_tree(cgroup: &Path) -> bool {
    directories(cgroup).iter().all(|below| remove_tree(below)) && fs::remove_dir(cgroup).is_ok()
}

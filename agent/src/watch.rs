//! Watch of the node records in files. inotify reports most changes; a comparison of the metadata
//! twice a second finds a replaced directory and a changed target of a symbolic link; a periodic
//! read covers network file systems.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::DirEntry;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

/// Delay without a further change after which changes are reported together.
const COALESCE_DELAY: Duration = Duration::from_millis(100);
/// Maximum delay of a report while changes continue.
const MAX_COALESCE_DELAY: Duration = Duration::from_millis(500);
/// Interval at which the metadata of the source is compared.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Interval at which the records are read again without a notification.
const RESCAN_INTERVAL: Duration = Duration::from_secs(10);

/// Watch of a file or directory with node records.
#[derive(Debug)]
pub struct SourceWatch {
    due: mpsc::Receiver<()>,
    _task: JoinSet<()>,
}

impl SourceWatch {
    /// Starts to watch a file or a directory, which need not exist.
    pub fn start(source: &Path) -> Self {
        let (sender, due) = mpsc::channel(1);
        let changed = Arc::new(Notify::new());
        let watcher = watcher(&changed)
            .inspect_err(|error| {
                tracing::warn!(%error, interval = ?RESCAN_INTERVAL, "no inotify, polling the node records");
            })
            .ok();
        let mut task = JoinSet::new();
        task.spawn(run(source.to_owned(), watcher, changed, sender));
        Self { due, _task: task }
    }

    /// Waits until the records should be read again.
    pub async fn due(&mut self) {
        if self.due.recv().await.is_none() {
            // The task ends only with this value. Waiting forever avoids a busy loop.
            std::future::pending::<()>().await;
        }
    }
}

fn watcher(changed: &Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let changed = Arc::clone(changed);
    notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Reading the records causes events as well, which must not cause another read.
        let read = event.is_ok_and(|event| match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => false,
            EventKind::Access(_) => true,
            _ => false,
        });
        if !read {
            changed.notify_one();
        }
    })
}

async fn run(
    source: PathBuf,
    mut watcher: Option<RecommendedWatcher>,
    changed: Arc<Notify>,
    due: mpsc::Sender<()>,
) {
    let mut rescan = tokio::time::interval(RESCAN_INTERVAL);
    rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut poll = tokio::time::interval(POLL_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Identity::of(&source);
    loop {
        tokio::select! {
            _ = rescan.tick() => subscribe(&source, watcher.as_mut()),
            () = changed.notified() => {
                coalesce(&changed).await;
                seen = Identity::of(&source);
                // The directory itself may have been replaced.
                subscribe(&source, watcher.as_mut());
            }
            _ = poll.tick() => {
                let now = Identity::of(&source);
                if now == seen {
                    continue;
                }
                seen = now;
                subscribe(&source, watcher.as_mut());
            }
        }
        if due.send(()).await.is_err() {
            return;
        }
    }
}

/// Version of a file or directory, and of the targets of symbolic links in a directory, because
/// inotify reports changes of the links only. `None` for a path that does not exist.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    source: Option<Version>,
    links: BTreeMap<OsString, Option<Version>>,
}

/// Version of the file that a path leads to, symbolic links followed.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    device: u64,
    inode: u64,
    /// Modification time, seconds and nanoseconds since 1970.
    modified: (i64, i64),
    /// Size in bytes.
    size: u64,
}

impl Identity {
    fn of(path: &Path) -> Self {
        let link = |entry: &DirEntry| entry.file_type().is_ok_and(|kind| kind.is_symlink());
        let links = std::fs::read_dir(path).map(|entries| {
            let links = entries.flatten().filter(link);
            links.map(|entry| (entry.file_name(), version(&entry.path()))).collect()
        });
        // A file, or a path that does not exist, has no entries.
        Self { source: version(path), links: links.unwrap_or_default() }
    }
}

fn version(path: &Path) -> Option<Version> {
    let found = std::fs::metadata(path).ok();
    found.map(|file| Version {
        device: file.dev(),
        inode: file.ino(),
        modified: (file.mtime(), file.mtime_nsec()),
        size: file.size(),
    })
}

/// Subscribes to the directory of the source. The caller repeats it, because inotify does not
/// follow a directory that was replaced.
fn subscribe(source: &Path, watcher: Option<&mut RecommendedWatcher>) {
    let Some(watcher) = watcher else { return };
    // A rename over a file is an event of its directory only.
    let parent = source.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = if source.is_dir() { source } else { parent.unwrap_or(Path::new(".")) };
    if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
        tracing::debug!(path = %directory.display(), %error, "cannot watch");
    }
}

async fn coalesce(changed: &Notify) {
    let latest = Instant::now() + MAX_COALESCE_DELAY;
    loop {
        let quiet = (Instant::now() + COALESCE_DELAY).min(latest);
        if tokio::time::timeout_at(quiet, changed.notified()).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn due(watch: &mut SourceWatch) -> bool {
        tokio::time::timeout(Duration::from_millis(900), watch.due()).await.is_ok()
    }

    async fn calm(watch: &mut SourceWatch) {
        while due(watch).await {}
    }

    #[tokio::test]
    async fn written_and_removed_file_are_reported_within_a_second() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = SourceWatch::start(directory.path());
        calm(&mut watch).await;
        let file = directory.path().join("a.toml");
        std::fs::write(&file, "x").unwrap();
        assert!(due(&mut watch).await);
        std::fs::read(&file).unwrap();
        assert!(!due(&mut watch).await, "a read must not count as a change");
        std::fs::remove_file(&file).unwrap();
        assert!(due(&mut watch).await);
    }

    #[tokio::test]
    async fn replaced_file_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("nodes.toml");
        std::fs::write(&file, "x").unwrap();
        let mut watch = SourceWatch::start(&file);
        calm(&mut watch).await;
        for text in ["y", "z"] {
            let new = directory.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &file).unwrap();
            assert!(due(&mut watch).await);
            calm(&mut watch).await;
        }
    }

    #[tokio::test]
    async fn replaced_directory_is_reported_and_watched() {
        let parent = tempfile::tempdir().unwrap();
        let source = parent.path().join("nodes.d");
        std::fs::create_dir(&source).unwrap();
        let mut watch = SourceWatch::start(&source);
        calm(&mut watch).await;
        let new = parent.path().join("new");
        std::fs::create_dir(&new).unwrap();
        std::fs::rename(&source, parent.path().join("old")).unwrap();
        std::fs::rename(&new, &source).unwrap();
        assert!(due(&mut watch).await);
        calm(&mut watch).await;
        let file = source.join("a.toml");
        std::fs::write(&file, "x").unwrap();
        assert!(due(&mut watch).await);
        calm(&mut watch).await;
        // A write in place does not change the directory itself.
        std::fs::write(&file, "y").unwrap();
        assert!(due(&mut watch).await);
    }

    #[tokio::test]
    async fn swapped_directory_of_links_is_reported() {
        // Layout of a mounted ConfigMap: files are links into ..data, which is a link that is
        // renamed.
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for version in ["v1", "v2"] {
            std::fs::create_dir(at(version)).unwrap();
            std::fs::write(at(version).join("a.toml"), version).unwrap();
        }
        std::os::unix::fs::symlink("v1", at("..data")).unwrap();
        std::os::unix::fs::symlink("..data/a.toml", at("a.toml")).unwrap();
        let mut watch = SourceWatch::start(directory.path());
        calm(&mut watch).await;
        std::os::unix::fs::symlink("v2", at("..data_tmp")).unwrap();
        std::fs::rename(at("..data_tmp"), at("..data")).unwrap();
        assert!(due(&mut watch).await);
    }

    #[tokio::test]
    async fn changed_target_of_a_link_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().join("nodes.toml");
        std::fs::write(&target, "x").unwrap();
        let link = directory.path().join("nodes.toml");
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let mut watch = SourceWatch::start(&link);
        calm(&mut watch).await;
        std::fs::write(&target, "longer").unwrap();
        assert!(due(&mut watch).await);
    }

    #[tokio::test]
    async fn changed_target_of_a_link_in_directory_is_reported() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["nodes", "store", "other"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        std::fs::write(at("store/a"), "1").unwrap();
        std::fs::write(at("other/a"), "2").unwrap();
        std::os::unix::fs::symlink(at("store/a"), at("nodes/a.toml")).unwrap();
        let mut watch = SourceWatch::start(&at("nodes"));
        calm(&mut watch).await;
        std::fs::write(at("store/a"), "longer").unwrap();
        assert!(due(&mut watch).await, "A link whose target was written must be reported.");
        calm(&mut watch).await;
        std::fs::write(at("store/new"), "4").unwrap();
        std::fs::rename(at("store/new"), at("store/a")).unwrap();
        assert!(due(&mut watch).await, "A link whose target was replaced must be reported.");
        calm(&mut watch).await;
        std::os::unix::fs::symlink(at("other/a"), at("nodes/.new")).unwrap();
        std::fs::rename(at("nodes/.new"), at("nodes/a.toml")).unwrap();
        assert!(due(&mut watch).await, "A link with a new target must be reported.");
        calm(&mut watch).await;
        std::fs::write(at("other/a"), "longer").unwrap();
        assert!(due(&mut watch).await, "A link whose new target was written must be reported.");
        calm(&mut watch).await;
        std::fs::remove_file(at("other/a")).unwrap();
        assert!(due(&mut watch).await, "A link whose target was removed must be reported.");
    }
}

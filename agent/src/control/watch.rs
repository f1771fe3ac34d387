//! Notice that the node records may have changed: by inotify, and by the clock for what inotify
//! does not see (network file systems, a directory that was away).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

/// Changes that come together are taken together when nothing came for this long …
const QUIET: Duration = Duration::from_millis(100);
/// … or at the latest after this long.
const PATIENCE: Duration = Duration::from_millis(500);
/// The records are read again this often in any case.
const RESCAN: Duration = Duration::from_secs(10);

/// Watches the source of the node records.
#[derive(Debug)]
pub struct SourceWatch {
    due: mpsc::Receiver<()>,
    task: JoinHandle<()>,
}

impl SourceWatch {
    /// Starts to watch a file or a directory, which need not exist.
    pub fn start(source: &Path) -> Self {
        let (sender, due) = mpsc::channel(1);
        let changed = Arc::new(Notify::new());
        let watcher = watcher(&changed)
            .inspect_err(|error| {
                tracing::warn!(%error, "no inotify: node records are read every {RESCAN:?} only");
            })
            .ok();
        let task = tokio::spawn(run(source.to_owned(), watcher, changed, sender));
        Self { due, task }
    }

    /// Waits until the records should be read again.
    pub async fn due(&mut self) {
        if self.due.recv().await.is_none() {
            // The task ends with this value only; never busy if that changes.
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for SourceWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn watcher(changed: &Arc<Notify>) -> notify::Result<RecommendedWatcher> {
    let changed = Arc::clone(changed);
    notify::recommended_watcher(move |event: notify::Result<Event>| {
        // Reading is an event too, and must not lead to reading again.
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
    let mut rescan = tokio::time::interval(RESCAN);
    rescan.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = rescan.tick() => subscribe(&source, watcher.as_mut()),
            () = changed.notified() => settle(&changed).await,
        }
        if due.send(()).await.is_err() {
            return;
        }
    }
}

/// Subscribes, again and again: a directory that was replaced is another one to inotify.
fn subscribe(source: &Path, watcher: Option<&mut RecommendedWatcher>) {
    let Some(watcher) = watcher else { return };
    // A file is replaced by renaming another over it, which only its directory tells.
    let parent = source.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = if source.is_dir() { source } else { parent.unwrap_or(Path::new(".")) };
    if let Err(error) = watcher.watch(directory, RecursiveMode::NonRecursive) {
        tracing::debug!(path = %directory.display(), %error, "cannot watch");
    }
}

async fn settle(changed: &Notify) {
    let latest = Instant::now() + PATIENCE;
    loop {
        let quiet = (Instant::now() + QUIET).min(latest);
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
    async fn a_written_and_a_removed_file_are_noticed_within_a_second() {
        let directory = tempfile::tempdir().unwrap();
        let mut watch = SourceWatch::start(directory.path());
        calm(&mut watch).await;
        let file = directory.path().join("a.toml");
        std::fs::write(&file, "x").unwrap();
        assert!(due(&mut watch).await);
        std::fs::read(&file).unwrap();
        assert!(!due(&mut watch).await, "reading is no change");
        std::fs::remove_file(&file).unwrap();
        assert!(due(&mut watch).await);
    }

    #[tokio::test]
    async fn a_file_that_is_replaced_is_noticed() {
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
}

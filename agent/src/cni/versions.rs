//! CNI versions that the network configuration may offer.
//!
//! A runtime takes the newest version of the configuration that its libcni has, and calls every
//! plugin of the list with that version (libcni: `NetworkConfFromBytes`). A plugin that does not
//! support it fails every ADD and DEL. The configuration therefore offers only what each plugin of
//! the list answers to `VERSION`.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use skein_cni_protocol::types::Version;
use thiserror::Error;

use crate::status::Offer;

/// Maximum time of one plugin's answer to `VERSION`.
const VERSION_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval at which a plugin that gave no answer is called again. A plugin that answered is called
/// again when its file changes.
const RETRY_INTERVAL: Duration = Duration::from_secs(60);
/// Delay before a plugin whose file is open for writing (ETXTBSY) is started again.
const BUSY_DELAY: Duration = Duration::from_millis(50);
/// Maximum number of starts of a plugin whose file is open for writing.
const MAX_STARTS: u32 = 10;
/// Maximum length of an answer, in bytes.
const MAX_ANSWER: u64 = 64 << 10;
/// Versions that Skein offers, oldest first.
const OFFERED: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];
/// Newest version that a plugin without an answer is expected to support. The reference plugins
/// have supported it since 1.0 (2021).
const ASSUMED_NEWEST: Version = Version::V1_0_0;

/// Identity and change time of a file (device, inode, ctime): any change of the file changes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    /// Time of the last change, seconds and nanoseconds since 1970.
    changed: (i64, i64),
}

/// [`Stamp`] of the file at `path`, symbolic links followed; `None` if there is no file.
pub(super) fn stamp(path: &Path) -> Option<Stamp> {
    let file = fs::metadata(path).ok()?;
    let changed = (file.ctime(), file.ctime_nsec());
    Some(Stamp { device: file.dev(), inode: file.ino(), changed })
}

/// A plugin of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plugin {
    /// All files of that name in the directories of the runtime.
    pub(super) paths: Vec<PathBuf>,
    /// `true` for an entry of Skein's, `false` for one that another program added.
    pub(super) own: bool,
}

/// Answers of plugins to `VERSION`, by file.
#[derive(Debug, Default)]
pub(super) struct VersionCache(HashMap<PathBuf, CachedAnswer>);

#[derive(Debug)]
struct CachedAnswer {
    stamp: Option<Stamp>,
    queried_at: Instant,
    answer: Result<Vec<Version>, QueryError>,
}

/// Reason why a plugin's versions are not known.
#[derive(Debug, Error)]
enum QueryError {
    /// The plugin cannot be started, or its answer cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("no answer within {VERSION_TIMEOUT:?}")]
    Timeout,
    #[error("its answer to VERSION is not valid")]
    Invalid,
}

/// The plugins of `cni.chain` have no CNI version in common.
#[derive(Debug, Error)]
#[error(
    "no CNI version suits all plugins of cni.chain: skein-cni supports {}, {}. Install a newer \
     plugin, or remove it from cni.chain.",
    names(&OFFERED), .supported.join(", ")
)]
pub(super) struct NoCommonVersion {
    /// Each plugin with its versions.
    supported: Vec<String>,
}

impl VersionCache {
    /// Returns the versions that all `plugins` support.
    ///
    /// A plugin that gives no answer counts as one that supports up to [`ASSUMED_NEWEST`]. An entry
    /// of another program counts only if it answers and leaves a common version.
    ///
    /// # Errors
    /// [`NoCommonVersion`] if Skein's own entries have no version in common.
    pub(super) fn offer(&mut self, plugins: &[Plugin]) -> Result<Offer, NoCommonVersion> {
        self.0.retain(|path, _| plugins.iter().any(|plugin| plugin.paths.contains(path)));
        let (mut common, mut limits, mut all) = (OFFERED.to_vec(), Vec::new(), Vec::new());
        // Skein's own entries come first: entries of other programs must not exclude the version
        // that these have in common.
        for own in [true, false] {
            for path in plugins.iter().filter(|p| p.own == own).flat_map(|plugin| &plugin.paths) {
                let shown = path.display();
                let supported = match self.answer(path) {
                    Ok(versions) => {
                        if !versions.contains(&Version::NEWEST) {
                            limits.push(format!("{shown} supports {}", names(versions)));
                        }
                        versions.clone()
                    }
                    Err(_) if !own => continue,
                    Err(error) => {
                        limits.push(format!(
                            "{shown} does not report its CNI versions ({error}): at most {} is offered",
                            ASSUMED_NEWEST.name()
                        ));
                        OFFERED.into_iter().filter(|version| *version <= ASSUMED_NEWEST).collect()
                    }
                };
                let left: Vec<_> =
                    common.iter().copied().filter(|v| supported.contains(v)).collect();
                all.push(format!("{shown} supports {}", names(&supported)));
                if own || !left.is_empty() {
                    common = left;
                } else {
                    limits.push(format!(
                        "pods fail: {shown}, which another program added, supports no common version"
                    ));
                }
            }
        }
        if common.is_empty() {
            return Err(NoCommonVersion { supported: all });
        }
        let versions = common.into_iter().map(|version| version.name().to_owned()).collect();
        Ok(Offer { versions, limits })
    }

    fn answer(&mut self, path: &Path) -> &Result<Vec<Version>, QueryError> {
        let now = stamp(path);
        let due = self.0.get(path).is_none_or(|known| {
            known.stamp != now
                || known.answer.is_err() && known.queried_at.elapsed() >= RETRY_INTERVAL
        });
        if due {
            let answer = query_versions(path);
            self.0.insert(
                path.to_owned(),
                CachedAnswer { stamp: now, queried_at: Instant::now(), answer },
            );
        }
        &self.0[path].answer
    }
}

/// Returns the names of versions, for messages.
fn names(versions: &[Version]) -> String {
    match versions {
        [] => "no version that Skein knows".to_owned(),
        all => all.iter().map(|version| version.name()).collect::<Vec<_>>().join(", "),
    }
}

/// Calls a plugin with `VERSION` and returns the versions of its answer that Skein knows.
fn query_versions(path: &Path) -> Result<Vec<Version>, QueryError> {
    let mut child = start(path)?;
    if let Some(mut input) = child.stdin.take() {
        // A plugin may close its input unread.
        let _ = input
            .write_all(format!("{{\"cniVersion\":\"{}\"}}", Version::NEWEST.name()).as_bytes());
    }
    let (sender, answer) = mpsc::channel();
    if let Some(output) = child.stdout.take() {
        // The thread ends with the plugin's processes, which are killed below.
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = sender.send(output.take(MAX_ANSWER).read_to_end(&mut text).map(|_| text));
        });
    }
    let answer = answer.recv_timeout(VERSION_TIMEOUT);
    // A wrapper script may have started processes that hold the output open. They are in its
    // process group, whose number is not reused before the wait.
    let _ = kill_process_group(Pid::from_child(&child), Signal::KILL);
    let _ = child.wait();
    let text = answer.map_err(|_| QueryError::Timeout)??;
    parse(&text).ok_or(QueryError::Invalid)
}

fn start(path: &Path) -> io::Result<std::process::Child> {
    let mut command = Command::new(path);
    // Plugins built with an old skel refuse VERSION without the variables of an ADD.
    command.env_clear().env("CNI_COMMAND", "VERSION");
    command.envs(["CNI_NETNS", "CNI_IFNAME", "CNI_PATH"].map(|name| (name, "dummy")));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    command.process_group(0);
    let mut starts = 1;
    loop {
        match command.spawn() {
            Err(error)
                if error.kind() == io::ErrorKind::ExecutableFileBusy && starts < MAX_STARTS =>
            {
                starts += 1;
                thread::sleep(BUSY_DELAY);
            }
            result => return result,
        }
    }
}

/// Parses `data` as an answer, for the fuzzer. The parsed versions are offered ones, in order.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_answer(data: &[u8]) {
    let versions = parse(data).unwrap_or_default();
    assert!(versions.is_sorted() && versions.iter().all(|version| OFFERED.contains(version)));
}

fn parse(text: &[u8]) -> Option<Vec<Version>> {
    let document: serde_json::Value = serde_json::from_slice(text).ok()?;
    let listed = document["supportedVersions"].as_array()?;
    let known = listed.iter().filter_map(|version| Version::parse(version.as_str()?));
    let mut known: Vec<_> = known.filter(|version| OFFERED.contains(version)).collect();
    known.sort_unstable();
    known.dedup();
    Some(known)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A plugin at `directory/name` that writes a line into `directory/calls` and runs `body`.
    fn plugin(directory: &Path, name: &str, body: &str) -> PathBuf {
        let (path, calls) = (directory.join(name), directory.join("calls"));
        let script = format!("#!/bin/sh\necho {name} >> {}\n{body}\n", calls.display());
        // Renames the file into place, as package managers do: the inode changes.
        let new = directory.join("unfinished");
        fs::write(&new, script).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(new, &path).unwrap();
        path
    }

    fn supports(versions: &[&str]) -> String {
        let document = serde_json::json!({ "cniVersion": "1.0.0", "supportedVersions": versions });
        format!("[ \"$CNI_COMMAND\" = VERSION ] && echo '{document}'")
    }

    fn own(path: &Path) -> Plugin {
        Plugin { paths: vec![path.to_owned()], own: true }
    }

    fn calls(directory: &Path) -> usize {
        fs::read_to_string(directory.join("calls")).unwrap_or_default().lines().count()
    }

    const UP_TO_1_0: [&str; 4] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0"];
    const UP_TO_1_1: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

    #[test]
    fn offer_is_what_every_plugin_supports() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let mut cache = VersionCache::default();
        let all = cache.offer(&[]).unwrap();
        assert_eq!(all.versions, ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]);
        assert_eq!((all.newest(), all.conservative()), ("1.1.0", "1.0.0"));
        let new = plugin(at, "new", &supports(&UP_TO_1_1));
        assert_eq!(cache.offer(&[own(&new)]).unwrap(), all);
        let old = plugin(at, "old", &supports(&UP_TO_1_0));
        let offer = cache.offer(&[own(&new), own(&old)]).unwrap();
        assert_eq!(offer.versions, ["0.3.1", "0.4.0", "1.0.0"]);
        assert_eq!(offer.limits.len(), 1, "{:?}", offer.limits);
        assert!(offer.limits[0].contains("/old supports"), "{:?}", offer.limits);
        let older = plugin(at, "older", &supports(&["0.2.0", "0.3.1", "0.4.0", "9.9.9"]));
        let offer = cache.offer(&[own(&new), own(&old), own(&older)]).unwrap();
        assert_eq!((offer.newest(), offer.conservative()), ("0.4.0", "0.4.0"));
        // The runtime may take either of two files of one name.
        let two = Plugin { paths: vec![new.clone(), old], own: true };
        assert_eq!(cache.offer(&[two]).unwrap().newest(), "1.0.0");
    }

    #[test]
    fn no_common_version_names_each_plugin() {
        let directory = tempfile::tempdir().unwrap();
        let new = plugin(directory.path(), "new", &supports(&["1.1.0"]));
        let old = plugin(directory.path(), "old", &supports(&["0.1.0", "0.3.1"]));
        let error = VersionCache::default().offer(&[own(&new), own(&old)]).unwrap_err().to_string();
        for part in ["/new supports 1.1.0", "/old supports 0.3.1", "cni.chain"] {
            assert!(error.contains(part), "{error}");
        }
        let ancient = plugin(directory.path(), "ancient", &supports(&["0.1.0"]));
        let error = VersionCache::default().offer(&[own(&ancient)]).unwrap_err().to_string();
        assert!(error.contains("/ancient supports no version"), "{error}");
    }

    #[test]
    fn plugin_is_called_again_only_when_its_file_changes() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let path = plugin(at, "portmap", &supports(&UP_TO_1_0));
        let mut cache = VersionCache::default();
        for _ in 0..3 {
            assert_eq!(cache.offer(&[own(&path)]).unwrap().newest(), "1.0.0");
        }
        assert_eq!(calls(at), 1, "an unchanged plugin is called once");
        plugin(at, "portmap", &supports(&UP_TO_1_1));
        for _ in 0..3 {
            assert_eq!(cache.offer(&[own(&path)]).unwrap().newest(), "1.1.0");
        }
        assert_eq!(calls(at), 2, "a changed plugin is called once more");
    }

    #[test]
    fn plugin_without_answer_limits_to_1_0() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        for (name, body) in [
            ("fails", "exit 1"),
            ("nonsense", "echo nonsense"),
            ("silent", "echo '{\"cniVersion\":\"1.0.0\"}'"),
        ] {
            let path = plugin(at, name, body);
            let offer = VersionCache::default().offer(&[own(&path)]).unwrap();
            assert_eq!(offer.newest(), "1.0.0", "{name}");
            assert!(offer.limits[0].contains(name), "{:?}", offer.limits);
        }
        // A link that leads to a file of the node that the agent's container does not have.
        let link = at.join("link");
        std::os::unix::fs::symlink("/nowhere/portmap", &link).unwrap();
        let offer = VersionCache::default().offer(&[own(&link)]).unwrap();
        assert_eq!(offer.newest(), "1.0.0");
    }

    #[test]
    fn hanging_plugin_is_killed_and_not_called_each_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = plugin(directory.path(), "hangs", "exec sleep 1000");
        let mut cache = VersionCache::default();
        for _ in 0..3 {
            let offer = cache.offer(&[own(&path)]).unwrap();
            assert!(offer.limits[0].contains("no answer within 5s"), "{:?}", offer.limits);
        }
        assert_eq!(calls(directory.path()), 1);
    }

    #[test]
    fn process_of_hanging_wrapper_script_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let body = format!("sleep 1000 &\necho $! > {}\nwait", file.display());
        let path = plugin(directory.path(), "wrapper", &body);
        let offer = VersionCache::default().offer(&[own(&path)]).unwrap();
        assert!(offer.limits[0].contains("no answer within 5s"), "{:?}", offer.limits);
        let pid = fs::read_to_string(file).unwrap();
        // Without a process that waits for it, a killed process remains as a zombie.
        let is_alive = || {
            let status = fs::read_to_string(format!("/proc/{}/status", pid.trim()));
            status.is_ok_and(|status| !status.contains("State:\tZ"))
        };
        let end = Instant::now() + Duration::from_secs(30);
        while is_alive() && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_alive(), "the process {pid} of the script is still alive");
    }

    #[test]
    fn entry_of_another_program_limits_only_if_it_can() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let foreign = |path: PathBuf| Plugin { paths: vec![path], own: false };
        let offer = |body: &str| {
            let plugins = [foreign(plugin(at, "istio-cni", body))];
            VersionCache::default().offer(&plugins).unwrap()
        };
        assert_eq!(offer(&supports(&UP_TO_1_0)).newest(), "1.0.0");
        assert_eq!(offer("exit 1").newest(), "1.1.0", "an unknown foreign plugin changes nothing");
        let none = offer(&supports(&["0.1.0"]));
        assert_eq!(none.newest(), "1.1.0");
        assert!(none.limits.iter().any(|limit| limit.contains("pods fail")), "{none:?}");
    }
}

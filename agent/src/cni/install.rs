//! The plugin's binary and the network configuration, where the container runtime looks for them:
//! the binary first, the configuration last and only once the agent can serve. Each is put in place
//! by a rename within its directory, so that nobody ever reads half a file.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use thiserror::Error;

use crate::config::Cni;

/// Name of the plugin's binary, and its `type` in the configuration.
pub const PLUGIN: &str = "skein-cni";

/// What is added to the names of other networks' configurations that are set aside.
const ASIDE: &str = ".skein-aside";

/// What a runtime that knows no `cniVersions` takes: containerd 1.6 refuses anything newer.
const CNI_VERSION: &str = "1.0.0";
/// What the plugin serves; a runtime that knows this key takes the newest that it has too.
const CNI_VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// Something could not be put in place or taken away.
#[derive(Debug, Error)]
#[error("cannot {what} {}: {source}", path.display())]
pub struct InstallError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl InstallError {
    fn new(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { what, path: path.to_owned(), source }
    }
}

/// A file as it was at one moment: any change of it changes this.
type Stamp = (u64, u64, i64, i64);

/// What the runtime needs of us, put in place again and again.
#[derive(Debug, Default)]
pub struct Install {
    /// Source and installed plugin when they were last the same.
    same: Option<[Stamp; 2]>,
    /// Whether everything was in place once.
    done: bool,
}

impl Install {
    /// The plugin, then the configuration, once the agent can serve: from then on the runtime starts pods.
    /// While a plugin of the chain is missing the configuration is not written: every pod would fail. One
    /// that is there stays, because without it no pod could be deleted.
    pub fn run(&mut self, config: &Cni, can_serve: bool) -> Result<(), String> {
        let text = |error: InstallError| error.to_string();
        let binary = can_serve && self.install_plugin(config).map_err(text)?;
        let missing = missing_plugins(config);
        if !missing.is_empty() {
            let directories = plugin_directories(config).map(|path| path.display().to_string());
            return Err(format!(
                "{} of cni.chain not in {}: put it there, name its directory in cni.plugin_dirs, or \
                 take it out of the chain",
                missing.join(", "),
                Vec::from_iter(directories).join(" or ")
            ));
        }
        if !can_serve {
            return Ok(());
        }
        let configuration = install_configuration(config).map_err(text)?;
        if config.exclusive {
            let aside = set_others_aside(config).map_err(text)?;
            if !aside.is_empty() {
                tracing::warn!(?aside, "other networks' configurations are set aside");
            }
        }
        if !self.done || binary || configuration {
            self.done = true;
            tracing::info!(binary, configuration, "the CNI plugin is installed");
            let earlier = earlier_configurations(config);
            if !earlier.is_empty() {
                tracing::warn!(?earlier, "the runtime takes another network's configuration first");
            }
        }
        Ok(())
    }

    /// Puts the plugin's binary in place, and returns whether it was another before. Where neither file
    /// has changed since the last time, none is read.
    fn install_plugin(&mut self, config: &Cni) -> Result<bool, InstallError> {
        let Some(directory) = &config.bin_dir else { return Ok(false) };
        let (source, installed) = (plugin_source(config), directory.join(PLUGIN));
        let stamps = || Some([stamp(&source)?, stamp(&installed)?]);
        let before = stamps();
        if before.is_some() && self.same == before {
            return Ok(false);
        }
        let mut binary = Vec::new();
        File::open(&source)
            .and_then(|mut file| file.read_to_end(&mut binary))
            .map_err(InstallError::new("read the plugin", &source))?;
        let changed = place(directory, PLUGIN.as_ref(), &binary, 0o755)?;
        // Only what did not change while it was read has been compared.
        self.same = before.filter(|before| !changed && stamps() == Some(*before));
        Ok(changed)
    }
}

fn stamp(path: &Path) -> Option<Stamp> {
    let file = fs::metadata(path).ok()?;
    Some((file.dev(), file.ino(), file.ctime(), file.ctime_nsec()))
}

/// Where the plugin's binary comes from.
fn plugin_source(config: &Cni) -> PathBuf {
    let beside = || {
        let own = std::env::current_exe().unwrap_or_default();
        own.with_file_name(PLUGIN)
    };
    config.plugin.clone().unwrap_or_else(beside)
}

/// Puts the network configuration in place, and returns whether it was another before.
fn install_configuration(config: &Cni) -> Result<bool, InstallError> {
    let Some(directory) = &config.conf_dir else { return Ok(false) };
    let mut text = serde_json::to_vec_pretty(&configuration(config)).unwrap_or_default();
    text.push(b'\n');
    place(directory, config.conf_file.as_ref(), &text, 0o644)
}

/// Configurations that the runtime would take before ours: it takes the first by name.
fn earlier_configurations(config: &Cni) -> Vec<OsString> {
    let mut names = other_configurations(config);
    names.retain(|name| name.as_os_str() < config.conf_file.as_str());
    names
}

/// Other networks' configurations in the directory, in the order of their names.
fn other_configurations(config: &Cni) -> Vec<OsString> {
    let counts = |name: &OsString| {
        let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
        name.as_os_str() != config.conf_file.as_str()
            && matches!(extension, Some("conf" | "conflist" | "json"))
    };
    names(config).into_iter().filter(counts).collect()
}

fn names(config: &Cni) -> Vec<OsString> {
    let entries = config.conf_dir.as_ref().and_then(|path| fs::read_dir(path).ok());
    let names = entries.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.file_name()));
    let mut names: Vec<OsString> = names.collect();
    names.sort();
    names
}

/// Gives every other network's configuration a name that no runtime reads; returns which.
fn set_others_aside(config: &Cni) -> Result<Vec<OsString>, InstallError> {
    let others = other_configurations(config);
    for name in &others {
        let mut aside = name.clone();
        aside.push(ASIDE);
        rename(config, name, &aside)?;
    }
    Ok(others)
}

/// Gives what was set aside its name back, unless there is one of that name; returns which.
pub fn take_others_back(config: &Cni) -> Result<Vec<String>, InstallError> {
    let mut back = Vec::new();
    for name in names(config) {
        let Some(original) = name.to_str().and_then(|name| name.strip_suffix(ASIDE)) else {
            continue;
        };
        let directory = config.conf_dir.as_ref().map(|directory| directory.join(original));
        if directory.is_some_and(|path| path.exists()) {
            continue;
        }
        rename(config, &name, original.as_ref())?;
        back.push(original.to_owned());
    }
    Ok(back)
}

fn rename(config: &Cni, from: &OsStr, to: &OsStr) -> Result<(), InstallError> {
    let Some(directory) = &config.conf_dir else { return Ok(()) };
    let from = directory.join(from);
    fs::rename(&from, directory.join(to)).map_err(InstallError::new("rename", &from))
}

/// Plugins of the chain that are not where the runtime looks for them; none where somebody else writes
/// the configuration.
fn missing_plugins(config: &Cni) -> Vec<&str> {
    if config.bin_dir.is_none() || config.conf_dir.is_none() {
        return Vec::new();
    }
    let named = config.chain.iter().filter_map(|plugin| plugin["type"].as_str());
    // A link may lead to where only the node itself sees it.
    let is_in = |directory: &Path, name: &str| fs::symlink_metadata(directory.join(name)).is_ok();
    named
        .filter(|name| !plugin_directories(config).any(|directory| is_in(directory, name)))
        .collect()
}

/// Where the runtime looks for plugins.
fn plugin_directories(config: &Cni) -> impl Iterator<Item = &Path> {
    config.bin_dir.iter().chain(&config.plugin_dirs).map(PathBuf::as_path)
}

/// Takes the configuration away; returns whether it was there.
pub fn remove_configuration(config: &Cni) -> Result<bool, InstallError> {
    remove(config.conf_dir.as_ref().map(|directory| directory.join(&config.conf_file)))
}

/// Takes the binary away; returns whether it was there.
pub fn remove_plugin(config: &Cni) -> Result<bool, InstallError> {
    remove(config.bin_dir.as_ref().map(|directory| directory.join(PLUGIN)))
}

/// The network configuration list (CNI specification 1.1.0, section 1).
fn configuration(config: &Cni) -> Value {
    let ours = json!({
        "type": PLUGIN,
        "capabilities": { "ips": true },
        "socket": config.socket,
        "spool": config.spool,
    });
    let plugins: Vec<Value> = std::iter::once(ours).chain(config.chain.iter().cloned()).collect();
    json!({
        "cniVersion": CNI_VERSION,
        "cniVersions": CNI_VERSIONS,
        "name": config.network,
        "plugins": plugins,
    })
}

/// Writes a file beside its place and renames it there, unless it is there already. The runtime
/// watches the directory for renames within it.
fn place(directory: &Path, name: &Path, contents: &[u8], mode: u32) -> Result<bool, InstallError> {
    let path = directory.join(name);
    let executable =
        |file: &File| file.metadata().is_ok_and(|m| m.permissions().mode() & 0o777 == mode);
    if let Ok(file) = File::open(&path)
        && executable(&file)
        && fs::read(&path).is_ok_and(|present| present == contents)
    {
        return Ok(false);
    }
    fs::create_dir_all(directory).map_err(InstallError::new("make the directory", directory))?;
    // No suffix that a runtime reads, and a name that the next try takes over.
    let temporary = directory.join(format!(".{}.new", name.display()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|error| {
        // What is left of a failed try helps nobody.
        let _ = fs::remove_file(&temporary);
        InstallError::new("write", &path)(error)
    })?;
    Ok(true)
}

fn remove(path: Option<PathBuf>) -> Result<bool, InstallError> {
    let Some(path) = path else { return Ok(false) };
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(InstallError::new("remove", &path)(error)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(directory: &Path) -> Cni {
        let text = format!(
            "name = 'a'\n[cni]\nbin_dir = {:?}\nconf_dir = {:?}\nplugin = {:?}\n",
            directory.join("bin"),
            directory.join("net.d"),
            directory.join("source"),
        );
        Config::parse(&text).unwrap().cni
    }

    #[test]
    fn files_are_put_in_place_once_and_taken_away() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let mut binary = Install::default();
        let error = binary.install_plugin(&config).unwrap_err().to_string();
        assert!(error.contains("source"), "{error}");
        fs::write(directory.path().join("source"), "one").unwrap();
        assert!(binary.install_plugin(&config).unwrap());
        for _ in 0..3 {
            assert!(!binary.install_plugin(&config).unwrap(), "it is there already");
        }
        fs::write(directory.path().join("source"), "two").unwrap();
        assert!(binary.install_plugin(&config).unwrap());
        let plugin = directory.path().join("bin/skein-cni");
        assert_eq!(fs::read_to_string(&plugin).unwrap(), "two");
        assert_eq!(fs::metadata(&plugin).unwrap().permissions().mode() & 0o777, 0o755);
        assert!(!binary.install_plugin(&config).unwrap());
        // Of the same length, and not executable: put right as well.
        fs::write(&plugin, "owt").unwrap();
        assert!(
            binary.install_plugin(&config).unwrap() && !binary.install_plugin(&config).unwrap()
        );
        fs::set_permissions(&plugin, Permissions::from_mode(0o644)).unwrap();
        assert!(
            binary.install_plugin(&config).unwrap() && !binary.install_plugin(&config).unwrap()
        );
        assert_eq!(fs::read_to_string(&plugin).unwrap(), "two");

        assert!(install_configuration(&config).unwrap());
        assert!(!install_configuration(&config).unwrap());
        let names = |path| {
            let entries = fs::read_dir(directory.path().join(path)).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
        };
        assert_eq!(names("net.d"), ["10-skein.conflist"], "nothing beside it");
        assert_eq!(names("bin"), ["skein-cni"]);
        assert!(remove_configuration(&config).unwrap() && remove_plugin(&config).unwrap());
        assert!(!remove_configuration(&config).unwrap() && !remove_plugin(&config).unwrap());
    }

    #[test]
    fn the_configuration_names_plugin_socket_and_chain() {
        let directory = tempfile::tempdir().unwrap();
        let list = configuration(&config(directory.path()));
        assert_eq!(list["cniVersion"], "1.0.0");
        assert_eq!(list["cniVersions"].as_array().unwrap().last().unwrap(), "1.1.0");
        assert_eq!(list["plugins"][0]["type"], "skein-cni");
        assert_eq!(list["plugins"][0]["socket"], "/run/skein/cni.sock");
        assert_eq!(list["plugins"][1]["type"], "portmap");
        assert_eq!(list["plugins"][1]["capabilities"]["portMappings"], true);
    }

    #[test]
    fn plugins_of_the_chain_are_missed_until_they_are_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        let (portmap, list) = (
            directory.path().join("bin/portmap"),
            directory.path().join("net.d/10-skein.conflist"),
        );
        fs::write(directory.path().join("source"), "one").unwrap();
        let mut install = Install::default();
        for can_serve in [false, true] {
            let reason = install.run(&config, can_serve).unwrap_err();
            let bin = config.bin_dir.as_ref().unwrap().display().to_string();
            assert!(reason.contains("portmap") && reason.contains(&bin), "{reason}");
            assert!(!list.exists(), "no pod would start with it");
        }
        // It leads to where nothing is from here.
        std::os::unix::fs::symlink("/nowhere/portmap", &portmap).unwrap();
        install.run(&config, false).unwrap();
        assert!(!list.exists(), "nobody serves yet");
        install.run(&config, true).unwrap();
        fs::remove_file(&portmap).unwrap();
        // The runtime looks there, too.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("portmap"), "").unwrap();
        let two = Cni { plugin_dirs: vec![elsewhere.path().to_owned()], ..config.clone() };
        Install::default().run(&two, true).unwrap();
        install.run(&config, true).unwrap_err();
        assert!(list.exists(), "without it no pod could be deleted");
        config.conf_dir = None;
        install.run(&config, true).unwrap();
    }

    #[test]
    fn configurations_that_come_first_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        assert!(earlier_configurations(&config).is_empty(), "no directory yet");
        install_configuration(&config).unwrap();
        for name in ["05-other.conf", "10-skein.conf", "09-notes.txt", "99-late.conflist"] {
            fs::write(directory.path().join("net.d").join(name), "{}").unwrap();
        }
        assert_eq!(earlier_configurations(&config), ["05-other.conf", "10-skein.conf"]);

        let others = ["05-other.conf", "10-skein.conf", "99-late.conflist"];
        assert_eq!(set_others_aside(&config).unwrap(), others);
        assert!(
            set_others_aside(&config).unwrap().is_empty()
                && earlier_configurations(&config).is_empty()
        );
        fs::write(directory.path().join("net.d/05-other.conf"), "new").unwrap();
        assert_eq!(take_others_back(&config).unwrap(), &others[1..]);
        let kept = fs::read_to_string(directory.path().join("net.d/05-other.conf")).unwrap();
        assert_eq!(kept, "new", "nothing is overwritten");
    }
}

//! The plugin's binary and the network configuration, where the container runtime looks for them:
//! the binary first, the configuration last and only once the agent can serve. Each is put in place
//! by a rename within its directory, so that nobody ever reads half a file.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
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

/// Puts the plugin's binary in place, and returns whether it was another before.
pub fn install_plugin(config: &Cni) -> Result<bool, InstallError> {
    let Some(directory) = &config.bin_dir else { return Ok(false) };
    let source = plugin_source(config);
    let mut binary = Vec::new();
    File::open(&source)
        .and_then(|mut file| file.read_to_end(&mut binary))
        .map_err(InstallError::new("read the plugin", &source))?;
    place(directory, PLUGIN.as_ref(), &binary, 0o755)
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
pub fn install_configuration(config: &Cni) -> Result<bool, InstallError> {
    let Some(directory) = &config.conf_dir else { return Ok(false) };
    let mut text = serde_json::to_vec_pretty(&configuration(config)).unwrap_or_default();
    text.push(b'\n');
    place(directory, config.conf_file.as_ref(), &text, 0o644)
}

/// Configurations that the runtime would take before ours: it takes the first by name.
pub fn earlier_configurations(config: &Cni) -> Vec<OsString> {
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
pub fn set_others_aside(config: &Cni) -> Result<Vec<OsString>, InstallError> {
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

/// Plugins of the chain that are not where the runtime looks for them.
pub fn missing_plugins(config: &Cni) -> Vec<&str> {
    let Some(directory) = &config.bin_dir else { return Vec::new() };
    let named = config.chain.iter().filter_map(|plugin| plugin["type"].as_str());
    named.filter(|name| !directory.join(name).exists()).collect()
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
        let error = install_plugin(&config).unwrap_err().to_string();
        assert!(error.contains("source"), "{error}");
        fs::write(directory.path().join("source"), "one").unwrap();
        assert!(install_plugin(&config).unwrap());
        assert!(!install_plugin(&config).unwrap(), "it is there already");
        fs::write(directory.path().join("source"), "two").unwrap();
        assert!(install_plugin(&config).unwrap());
        let plugin = directory.path().join("bin/skein-cni");
        assert_eq!(fs::read_to_string(&plugin).unwrap(), "two");
        assert_eq!(fs::metadata(&plugin).unwrap().permissions().mode() & 0o777, 0o755);

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

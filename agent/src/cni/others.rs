//! Configuration files of other networks in the directory of the runtime. The runtime takes the
//! first file by name.
//!
//! With `cni.exclusive`, files that sort before Skein's get a name that no runtime reads. Files
//! that sort after Skein's have no effect on the runtime (podman's and CRI-O's defaults), and
//! meta-plugins delegate to Skein. Both stay.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::conflist;
use super::install::InstallError;
use crate::config::Cni;

/// Suffix of a file that is set aside.
const ASIDE: &str = ".skein-aside";

/// Plugins that call or extend the network of another configuration. A file with such a plugin is
/// not a network of its own.
const META_PLUGINS: [&str; 6] =
    ["multus", "multus-shim", "istio-cni", "linkerd-cni", "genie", "danm"];

/// Returns the file names of the networks that the runtime would take instead of Skein, sorted.
pub(super) fn networks_before(config: &Cni) -> Vec<OsString> {
    let names = names(config).unwrap_or_default();
    names.into_iter().filter(|name| is_network_before(config, name, name)).collect()
}

/// Renames each network that the runtime would take instead of Skein; returns the names.
///
/// # Errors
/// [`InstallError`] if the directory cannot be read or a file cannot be renamed.
pub(super) fn set_aside(config: &Cni) -> Result<Vec<OsString>, InstallError> {
    let mut names = names(config)?;
    names.retain(|name| is_network_before(config, name, name));
    for name in &names {
        let mut aside = name.clone();
        aside.push(ASIDE);
        rename(config, name, &aside)?;
    }
    Ok(names)
}

/// Restores the files that are set aside but that [`set_aside`] would leave in place; returns the
/// names.
///
/// # Errors
/// [`InstallError`] if the directory cannot be read or a file cannot be renamed.
pub(super) fn give_back_spared(config: &Cni) -> Result<Vec<String>, InstallError> {
    give_back(config, |aside, original| !is_network_before(config, aside, original.as_ref()))
}

/// Restores all files that are set aside, except those whose name is in use again; returns the
/// names.
///
/// # Errors
/// [`InstallError`] if the directory cannot be read or a file cannot be renamed.
pub fn give_back_all(config: &Cni) -> Result<Vec<String>, InstallError> {
    give_back(config, |_, _| true)
}

fn give_back(
    config: &Cni,
    wanted: impl Fn(&OsStr, &str) -> bool,
) -> Result<Vec<String>, InstallError> {
    let mut back = Vec::new();
    for name in names(config)? {
        let Some(original) = name.to_str().and_then(|name| name.strip_suffix(ASIDE)) else {
            continue;
        };
        let in_use = path(config, original.as_ref()).is_some_and(|path| path.exists());
        if in_use || !wanted(&name, original) {
            continue;
        }
        rename(config, &name, original.as_ref())?;
        back.push(original.to_owned());
    }
    Ok(back)
}

/// Returns whether the runtime would take the file `file`, if named `name`, as another network
/// instead of Skein's.
fn is_network_before(config: &Cni, file: &OsStr, name: &OsStr) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    if name >= OsStr::new(&config.conf_file)
        || !matches!(extension, Some("conf" | "conflist" | "json"))
    {
        return false;
    }
    // A file that cannot be read or parsed stops a runtime, too.
    let text = path(config, file).and_then(|path| fs::read(path).ok()).unwrap_or_default();
    !conflist::types(&text).iter().any(|name| META_PLUGINS.contains(&name.as_str()))
}

fn path(config: &Cni, name: &OsStr) -> Option<PathBuf> {
    config.conf_dir.as_ref().map(|directory| directory.join(name))
}

/// Returns the names of all files of the directory, sorted; empty if the directory does not exist.
fn names(config: &Cni) -> Result<Vec<OsString>, InstallError> {
    let Some(directory) = &config.conf_dir else { return Ok(Vec::new()) };
    let failed = |error| InstallError::new("read the directory", directory)(error);
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let names = entries.map(|entry| Ok(entry.map_err(failed)?.file_name()));
    let mut names: Vec<OsString> = names.collect::<Result<_, _>>()?;
    names.sort();
    Ok(names)
}

fn rename(config: &Cni, from: &OsStr, to: &OsStr) -> Result<(), InstallError> {
    let Some(directory) = &config.conf_dir else { return Ok(()) };
    let from = directory.join(from);
    fs::rename(&from, directory.join(to)).map_err(InstallError::new("rename", &from))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(directory: &Path) -> Cni {
        let text = format!("name = 'a'\n[cni]\nconf_dir = {directory:?}\n");
        Config::parse(&text).unwrap().cni
    }

    fn write(directory: &Path, files: &[(&str, &str)]) {
        files.iter().for_each(|(name, text)| fs::write(directory.join(name), text).unwrap());
    }

    const FLANNEL: &str = r#"{"name":"cbr0","plugins":[{"type":"flannel"},{"type":"portmap"}]}"#;

    #[test]
    fn networks_before_skein_are_set_aside_and_restored() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        assert!(networks_before(&config).is_empty() && set_aside(&config).unwrap().is_empty());
        write(
            directory.path(),
            &[
                ("05-cilium.conflist", FLANNEL),
                ("10-flannel.conflist", FLANNEL),
                ("10-skein.conf", FLANNEL),
                ("01-broken.json", "{"),
                ("10-skein.conflist", "{}"),
                ("09-notes.txt", ""),
            ],
        );
        let before =
            ["01-broken.json", "05-cilium.conflist", "10-flannel.conflist", "10-skein.conf"];
        assert_eq!(networks_before(&config), before);
        assert_eq!(set_aside(&config).unwrap(), before);
        assert!(networks_before(&config).is_empty() && set_aside(&config).unwrap().is_empty());
        assert!(give_back_spared(&config).unwrap().is_empty(), "another network comes back");
        write(directory.path(), &[("10-flannel.conflist", "new")]);
        let back = ["01-broken.json", "05-cilium.conflist", "10-skein.conf"];
        assert_eq!(give_back_all(&config).unwrap(), back);
        let kept = fs::read_to_string(directory.path().join("10-flannel.conflist")).unwrap();
        assert_eq!(kept, "new", "nothing is overwritten");
    }

    #[test]
    fn meta_plugins_and_files_behind_skein_stay() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let spared = [
            ("00-multus.conf", r#"{"type":"multus","delegates":[{"type":"skein-cni"}]}"#),
            ("00-multus.conflist", r#"{"plugins":[{"type":"multus-shim"}]}"#),
            // Istio's own copy of the first configuration, since 1.27.
            ("02-istio-cni.conflist", r#"{"plugins":[{"type":"skein-cni"},{"type":"istio-cni"}]}"#),
            ("01-linkerd-cni.conf", r#"{"type":"linkerd-cni"}"#),
            ("100-crio-bridge.conflist", r#"{"plugins":[{"type":"bridge"}]}"#),
            ("200-loopback.conf", r#"{"type":"loopback"}"#),
            ("87-podman-bridge.conflist", r#"{"plugins":[{"type":"bridge"}]}"#),
            ("YYY-istio-cni.conf", r#"{"type":"istio-cni"}"#),
        ];
        write(directory.path(), &spared);
        assert!(set_aside(&config).unwrap().is_empty());
        assert!(networks_before(&config).is_empty());
        // An earlier version of Skein set them aside.
        for (name, _) in spared {
            rename(&config, name.as_ref(), format!("{name}{ASIDE}").as_ref()).unwrap();
        }
        let mut names: Vec<&str> = spared.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        assert_eq!(give_back_spared(&config).unwrap(), names);
    }
}

//! Configuration files of other networks in the directory of the runtime. The runtime takes the
//! first file by name.
//!
//! With `cni.exclusive`, files that sort before Skein's get a name that no runtime reads. Files
//! that sort after Skein's have no effect on the runtime (podman's and CRI-O's defaults),
//! meta-plugins delegate to Skein, and Istio and Linkerd extend it. Such files stay.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::conflist::{self, PLUGIN};
use super::files::InstallError;
use crate::config::Cni;

/// Suffix of a file that is set aside.
const ASIDE: &str = ".skein-aside";

/// Plugins that call the network of another configuration.
const META_PLUGINS: [&str; 4] = ["multus", "multus-shim", "genie", "danm"];

/// Plugins that extend the network of the list that they are appended to.
const APPENDED_PLUGINS: [&str; 2] = ["istio-cni", "linkerd-cni"];

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
pub(super) fn restore_spared(config: &Cni) -> Result<Vec<String>, InstallError> {
    restore(config, |aside, original| !is_network_before(config, aside, original.as_ref()))
}

/// Restores all files that are set aside, except those whose name is in use again; returns the
/// names.
///
/// # Errors
/// [`InstallError`] if the directory cannot be read or a file cannot be renamed.
pub(super) fn restore_all(config: &Cni) -> Result<Vec<String>, InstallError> {
    restore(config, |_, _| true)
}

fn restore(
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
    // A runtime also fails on a file that cannot be read or parsed.
    let text = path(config, file).and_then(|path| fs::read(path).ok()).unwrap_or_default();
    !is_spared(&conflist::types(&text))
}

/// Returns `true` if a file with plugins of these `types` is not another network: a meta-plugin, a
/// file of appended plugins alone, or a copy of Skein's list with an appended plugin. An appended
/// plugin in the list of another network changes nothing.
fn is_spared(types: &[String]) -> bool {
    let meta = |name: &String| META_PLUGINS.contains(&name.as_str());
    let appended = |name: &String| APPENDED_PLUGINS.contains(&name.as_str());
    let extends_skein = types.iter().any(|name| name == PLUGIN) || types.iter().all(appended);
    types.iter().any(meta) || types.iter().any(appended) && extends_skein
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

    const ISTIO_COPY: &str =
        r#"{"plugins":[{"type":"skein-cni"},{"type":"portmap"},{"type":"istio-cni"}]}"#;

    const FLANNEL_ISTIO: &str =
        r#"{"plugins":[{"type":"flannel"},{"type":"portmap"},{"type":"istio-cni"}]}"#;

    const CALICO_LINKERD: &str =
        r#"{"plugins":[{"type":"calico"},{"type":"bandwidth"},{"type":"linkerd-cni"}]}"#;

    #[test]
    fn network_with_appended_plugin_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let names = ["10-calico.conflist", "10-flannel.conflist"];
        write(directory.path(), &[(names[0], CALICO_LINKERD), (names[1], FLANNEL_ISTIO)]);
        assert_eq!(networks_before(&config), names, "both files are other networks");
        assert_eq!(set_aside(&config).unwrap(), names);
        assert!(networks_before(&config).is_empty(), "Skein is the first network");
    }

    #[test]
    fn aside_network_with_appended_plugin_stays_aside() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let aside = ["10-calico.conflist.skein-aside", "10-flannel.conflist.skein-aside"];
        write(directory.path(), &[(aside[0], CALICO_LINKERD), (aside[1], FLANNEL_ISTIO)]);
        assert!(restore_spared(&config).unwrap().is_empty(), "another network was restored");
        assert_eq!(super::names(&config).unwrap(), aside);
        let back = restore_all(&config).unwrap();
        assert_eq!(back, ["10-calico.conflist", "10-flannel.conflist"]);
    }

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
        assert!(restore_spared(&config).unwrap().is_empty(), "another network comes back");
        write(directory.path(), &[("10-flannel.conflist", "new")]);
        let back = ["01-broken.json", "05-cilium.conflist", "10-skein.conf"];
        assert_eq!(restore_all(&config).unwrap(), back);
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
            ("02-istio-cni.conflist", ISTIO_COPY),
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
        assert_eq!(restore_spared(&config).unwrap(), names);
    }
}

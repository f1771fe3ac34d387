//! Installation of the plugin's binary and the network configuration in the directories of the
//! container runtime: the binary first, the configuration last and only after the agent was ready.
//! Each file is renamed into place, so that the runtime never reads an incomplete file.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::bail;

use super::conflist::{PLUGIN, foreign_types, repaired, wanted};
use super::files::{InstallError, Mode, place, read, remove, repair_mode};
use super::others;
use super::versions::{Plugin, Stamp, VersionCache, stamp};
use crate::config::Cni;
use crate::status::Offer;

/// Installer of the plugin's binary and the network configuration, run again for each repair.
#[derive(Debug, Default)]
pub(super) struct Install {
    /// Stamps of the source and of the installed plugin when their contents were last equal.
    same: Option<[Stamp; 2]>,
    /// True after the first complete installation.
    done: bool,
    versions: VersionCache,
    offer: Offer,
}

impl Install {
    /// Installs the plugin and then the configuration. Without `can_serve`, which is true once the
    /// agent has been ready, only the chain is checked: the runtime starts pods as soon as the
    /// configuration exists. Correct files are not written. An existing configuration always stays,
    /// because pods cannot be deleted without it.
    ///
    /// # Errors
    /// An error if a plugin of the chain is missing, if the plugins have no CNI version in common
    /// ([`NoCommonVersion`]), or if a file cannot be read or written ([`InstallError`]).
    ///
    /// [`NoCommonVersion`]: super::versions::NoCommonVersion
    pub(super) fn run(&mut self, config: &Cni, can_serve: bool) -> anyhow::Result<()> {
        let binary = can_serve && self.install_plugin(config)?;
        let missing = missing_plugins(config);
        if !missing.is_empty() {
            let directories = plugin_directories(config).map(|path| path.display().to_string());
            bail!(
                "{} of cni.chain not in {}. Install the plugin there, add its directory to \
                 cni.plugin_dirs, or remove it from cni.chain.",
                missing.join(", "),
                Vec::from_iter(directories).join(" or ")
            );
        }
        if !can_serve {
            return Ok(());
        }
        let configuration = self.install_configuration(config)?;
        if config.exclusive {
            let aside = others::set_aside(config)?;
            if !aside.is_empty() {
                tracing::warn!(files = ?aside, "configurations of other networks set aside");
            }
            let back = others::restore_spared(config)?;
            if !back.is_empty() {
                tracing::info!(
                    files = ?back,
                    "configurations of other networks restored, no longer set aside"
                );
            }
        }
        if !self.done || binary || configuration {
            self.done = true;
            tracing::info!(binary, configuration, "CNI plugin installed");
            let earlier = others::networks_before(config);
            if !earlier.is_empty() {
                tracing::warn!(files = ?earlier, "runtime uses the configuration of another network");
            }
        }
        Ok(())
    }

    /// Returns the CNI versions of the network configuration, as of the last [`Install::run`].
    pub(super) fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Writes the network configuration, and returns whether it has changed.
    fn install_configuration(&mut self, config: &Cni) -> anyhow::Result<bool> {
        let Some(directory) = &config.conf_dir else { return Ok(false) };
        let path = directory.join(&config.conf_file);
        let present = read(&path)?;
        let offer = self.versions.offer(&list_plugins(config, &present))?;
        if offer != self.offer {
            for limit in &offer.limits {
                tracing::warn!(newest = offer.newest(), "CNI versions are limited: {limit}");
            }
            self.offer = offer;
        }
        // Plugins have seconds to answer, and another program may have changed the list meanwhile.
        let present = read(&path)?;
        let Some(list) = repaired(wanted(config, &self.offer), &present) else {
            return Ok(repair_mode(&path, Mode::CONFIGURATION)?);
        };
        let mut contents = serde_json::to_vec_pretty(&list).unwrap_or_default();
        contents.push(b'\n');
        Ok(place(directory, config.conf_file.as_ref(), &contents, Mode::CONFIGURATION)?)
    }

    /// Installs the plugin's binary, and returns whether it has changed. If neither file has
    /// changed since the last call, no file is read.
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
        let changed = place(directory, PLUGIN.as_ref(), &binary, Mode::PROGRAM)?;
        // The comparison is valid only if neither file has changed during it.
        self.same = before.filter(|before| !changed && stamps() == Some(*before));
        Ok(changed)
    }
}

/// Returns the path of the plugin's binary to install: `cni.plugin`, or the plugin next to this
/// program.
fn plugin_source(config: &Cni) -> PathBuf {
    let next_to_agent = || {
        let own = std::env::current_exe().unwrap_or_default();
        own.with_file_name(PLUGIN)
    };
    config.plugin.clone().unwrap_or_else(next_to_agent)
}

/// Returns the plugins of the chain that are in no directory of the runtime; empty if the agent
/// does not write the configuration.
fn missing_plugins(config: &Cni) -> Vec<&str> {
    if config.bin_dir.is_none() || config.conf_dir.is_none() {
        return Vec::new();
    }
    let named = config.chain.iter().filter_map(|plugin| plugin["type"].as_str());
    named.filter(|name| plugin_files(config, name).is_empty()).collect()
}

/// Returns the plugins after Skein's in the list `present`, as it is or as it will be written.
fn list_plugins(config: &Cni, present: &[u8]) -> Vec<Plugin> {
    let own = config.chain.iter().filter_map(|plugin| plugin["type"].as_str());
    let own = own.map(|name| Plugin { paths: plugin_files(config, name), own: true });
    let foreign = foreign_types(config, present);
    let foreign =
        foreign.iter().map(|name| Plugin { paths: plugin_files(config, name), own: false });
    own.chain(foreign).collect()
}

/// Returns the files of the plugin `name` in all directories of the runtime; none for a name that
/// is a path. Other programs write types into the list, and the agent runs the files that it finds.
/// A symbolic link counts even if its target does not exist.
fn plugin_files(config: &Cni, name: &str) -> Vec<PathBuf> {
    if Path::new(name).file_name() != Some(name.as_ref()) {
        return Vec::new();
    }
    let paths = plugin_directories(config).map(|directory| directory.join(name));
    // The target of a link may exist on the node but not in the agent's container.
    paths.filter(|path| fs::symlink_metadata(path).is_ok()).collect()
}

/// Returns the directories in which the runtime looks for plugins.
fn plugin_directories(config: &Cni) -> impl Iterator<Item = &Path> {
    config.bin_dir.iter().chain(&config.plugin_dirs).map(PathBuf::as_path)
}

/// Removes the network configuration; returns whether it existed.
///
/// # Errors
/// [`InstallError`] if the file exists and cannot be removed.
pub(super) fn remove_configuration(config: &Cni) -> Result<bool, InstallError> {
    remove(config.conf_dir.as_ref().map(|directory| directory.join(&config.conf_file)))
}

/// Removes the plugin's binary; returns whether it existed.
///
/// # Errors
/// [`InstallError`] if the file exists and cannot be removed.
pub(super) fn remove_plugin(config: &Cni) -> Result<bool, InstallError> {
    remove(config.bin_dir.as_ref().map(|directory| directory.join(PLUGIN)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

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
    fn files_are_installed_once_and_removed() {
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
        // A file of the same length that is not executable is repaired as well.
        fs::write(&plugin, "owt").unwrap();
        assert!(
            binary.install_plugin(&config).unwrap() && !binary.install_plugin(&config).unwrap()
        );
        fs::set_permissions(&plugin, Permissions::from_mode(0o644)).unwrap();
        assert!(
            binary.install_plugin(&config).unwrap() && !binary.install_plugin(&config).unwrap()
        );
        assert_eq!(fs::read_to_string(&plugin).unwrap(), "two");

        assert!(binary.install_configuration(&config).unwrap());
        assert!(!binary.install_configuration(&config).unwrap());
        let names = |path| {
            let entries = fs::read_dir(directory.path().join(path)).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
        };
        assert_eq!(names("net.d"), ["10-skein.conflist"], "no temporary file remains");
        assert_eq!(names("bin"), ["skein-cni"]);
        assert!(remove_configuration(&config).unwrap() && remove_plugin(&config).unwrap());
        assert!(!remove_configuration(&config).unwrap() && !remove_plugin(&config).unwrap());
    }

    #[test]
    fn missing_plugin_of_chain_prevents_configuration() {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        let (portmap, list) = (
            directory.path().join("bin/portmap"),
            directory.path().join("net.d/10-skein.conflist"),
        );
        fs::write(directory.path().join("source"), "one").unwrap();
        let mut install = Install::default();
        for can_serve in [false, true] {
            let reason = install.run(&config, can_serve).unwrap_err().to_string();
            let bin = config.bin_dir.as_ref().unwrap().display().to_string();
            assert!(reason.contains("portmap") && reason.contains(&bin), "{reason}");
            assert!(!list.exists(), "no pod would start with it");
        }
        // The target of the link does not exist here.
        std::os::unix::fs::symlink("/nowhere/portmap", &portmap).unwrap();
        install.run(&config, false).unwrap();
        assert!(!list.exists(), "the agent cannot serve yet");
        install.run(&config, true).unwrap();
        fs::remove_file(&portmap).unwrap();
        // The runtime looks in cni.plugin_dirs as well.
        let elsewhere = tempfile::tempdir().unwrap();
        fs::write(elsewhere.path().join("portmap"), "").unwrap();
        let two = Cni { plugin_dirs: vec![elsewhere.path().to_owned()], ..config.clone() };
        Install::default().run(&two, true).unwrap();
        install.run(&config, true).unwrap_err();
        assert!(list.exists(), "without it no pod could be deleted");
        config.conf_dir = None;
        install.run(&config, true).unwrap();
    }

    /// Runs the installation. During the request for its versions, the plugin of the chain replaces
    /// the list by the result of `change`. Returns the result, the replaced text and the list's
    /// text after the run.
    fn list_changed_while_plugin_is_asked(
        change: impl Fn(&mut serde_json::Value),
    ) -> (bool, String, String) {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let (plugin, new) = (directory.path().join("bin/portmap"), directory.path().join("new"));
        let list = directory.path().join("net.d/10-skein.conflist");
        let answer = r#"{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}"#;
        let script = |body: &str| {
            place(
                &directory.path().join("bin"),
                "portmap".as_ref(),
                format!("#!/bin/sh\n{body}\necho '{answer}'\n").as_bytes(),
                Mode::PROGRAM,
            )
        };
        script("").unwrap();
        Install::default().install_configuration(&config).unwrap();
        let mut document = serde_json::from_slice(&fs::read(&list).unwrap()).unwrap();
        change(&mut document);
        // Without spaces: a list that is written again has another text.
        let text = document.to_string();
        fs::write(&new, &text).unwrap();
        script(&format!("mv {} {}", new.display(), list.display())).unwrap();
        let changed = Install::default().install_configuration(&config).unwrap();
        assert!(!new.exists(), "{} was not called", plugin.display());
        (changed, text, fs::read_to_string(list).unwrap())
    }

    #[test]
    fn entry_added_while_plugins_are_asked_stays() {
        let istio = serde_json::json!({ "type": "istio-cni" });
        let append = |list: &mut serde_json::Value| {
            list["plugins"].as_array_mut().unwrap().push(istio.clone());
        };
        let (changed, replaced, after) = list_changed_while_plugin_is_asked(append);
        assert!(!changed, "nothing of Skein's needs a repair");
        assert_eq!(after, replaced, "the contents were written");
        let (changed, _, after) = list_changed_while_plugin_is_asked(|list| {
            append(list);
            list["plugins"][0]["socket"] = "/elsewhere".into();
        });
        let list: serde_json::Value = serde_json::from_str(&after).unwrap();
        assert!(changed, "Skein's entry is repaired");
        assert_eq!(list["plugins"][0]["socket"], "/run/skein/cni.sock");
        assert_eq!(list["plugins"][2], istio, "the new entry is kept: {after}");
    }

    #[test]
    fn type_that_is_a_path_runs_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        let program = |name: &str| {
            let text = format!("#!/bin/sh\ntouch {}\n", directory.path().join("ran").display());
            place(directory.path(), name.as_ref(), text.as_bytes(), Mode::PROGRAM).unwrap();
        };
        fs::create_dir(directory.path().join("bin")).unwrap();
        program("portmap");
        program("outside");
        let absolute = directory.path().join("outside").display().to_string();
        for name in ["../outside", &absolute, "..", ".", "", "../bin/../outside"] {
            let list = serde_json::json!({ "plugins": [{ "type": name }] }).to_string();
            assert!(plugin_files(&config, name).is_empty(), "{name:?}");
            place(
                &directory.path().join("net.d"),
                config.conf_file.as_ref(),
                list.as_bytes(),
                Mode::CONFIGURATION,
            )
            .unwrap();
            // The plugin of the chain is missing there.
            Install::default().install_configuration(&config).unwrap();
        }
        assert!(!directory.path().join("ran").exists(), "A file outside the directories has run.");
    }

    #[test]
    fn stricter_file_mode_stays_and_looser_one_goes() {
        let directory = tempfile::tempdir().unwrap();
        let config = config(directory.path());
        fs::write(directory.path().join("source"), "one").unwrap();
        let mut install = Install::default();
        let plugin = directory.path().join("bin/skein-cni");
        let list = directory.path().join("net.d/10-skein.conflist");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let set =
            |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
        install.install_plugin(&config).unwrap();
        install.install_configuration(&config).unwrap();
        assert_eq!((mode(&plugin), mode(&list)), (0o755, 0o644));
        for (program, configuration) in [(0o700, 0o600), (0o750, 0o640), (0o500, 0o400)] {
            set(&plugin, program);
            set(&list, configuration);
            assert!(!install.install_plugin(&config).unwrap(), "{program:o} is undone");
            assert!(
                !install.install_configuration(&config).unwrap(),
                "{configuration:o} is undone"
            );
            // New contents keep the mode.
            fs::write(&plugin, "two").unwrap();
            fs::write(&list, "two").unwrap();
            assert!(install.install_plugin(&config).unwrap());
            assert!(install.install_configuration(&config).unwrap());
            assert_eq!((mode(&plugin), mode(&list)), (program, configuration));
        }
        for (program, configuration) in [(0o777, 0o666), (0o644, 0o244), (0o4755, 0o755)] {
            set(&plugin, program);
            set(&list, configuration);
            assert!(install.install_plugin(&config).unwrap(), "{program:o} stays");
            assert!(install.install_configuration(&config).unwrap(), "{configuration:o} stays");
            assert_eq!((mode(&plugin), mode(&list)), (0o755, 0o644));
        }
    }
}

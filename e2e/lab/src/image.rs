//! Container images, made from files of this host without a registry.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::process;
use crate::packages;

/// Writes the files below `root` as an image in the format of `docker save`. `config` is the
/// configuration of its containers, such as `Cmd`, `Entrypoint` and `Env`.
///
/// # Errors
/// If a file cannot be written, or if `tar` or `sha256sum` fails.
pub fn write(root: &Path, name: &str, config: &Value, to: &Path) -> Result<()> {
    let parts = to.with_extension("parts");
    fs::create_dir_all(&parts).with_context(|| format!("creating {}", parts.display()))?;
    let layer = parts.join("layer.tar");
    tar(root, &layer, &["--owner=0", "--group=0", "."])?;
    let sum = process::run(Command::new("sha256sum").arg(&layer))?;
    let sum = sum.split_whitespace().next().context("no checksum")?;
    let machine = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = json!({
        "architecture": machine, "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(parts.join("config.json"), config.to_string())?;
    fs::write(parts.join("manifest.json"), manifest.to_string())?;
    tar(&parts, to, &["manifest.json", "config.json", "layer.tar"])?;
    fs::remove_dir_all(&parts).context("removing an image's parts")
}

fn tar(from: &Path, to: &Path, what: &[&str]) -> Result<()> {
    let mut command = Command::new("tar");
    process::run(command.arg("-C").arg(from).arg("-cf").arg(to).args(what)).map(drop)
}

/// Creates a root directory with busybox and a symbolic link for each of its applets.
///
/// # Errors
///
/// Returns an error if this host has no statically linked busybox, or if a file cannot be created.
pub fn busybox(root: &Path) -> Result<()> {
    let busybox = packages::path(&packages::BUSYBOX)?;
    for path in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(path))?;
    }
    fs::copy(&busybox, root.join("bin/busybox")).context("copying busybox")?;
    let applets = process::run(Command::new(&busybox).arg("--list"))?;
    for applet in applets.lines().filter(|name| *name != "busybox") {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(())
}

/// Copies programs of this host to `/usr/bin` of a root directory, with the libraries that they
/// load.
///
/// # Errors
/// If this host lacks a program, if a file cannot be copied, or if `ldd` fails, for example for a
/// static program.
pub fn add_programs(root: &Path, programs: &[&str]) -> Result<()> {
    let bin = root.join("usr/bin");
    fs::create_dir_all(&bin)?;
    for program in programs {
        let from = packages::find(program).with_context(|| format!("no {program} on this host"))?;
        fs::copy(&from, bin.join(program)).with_context(|| format!("copying {program}"))?;
        for library in libraries(&from)? {
            let to = root.join(library.strip_prefix("/").unwrap_or(&library));
            if to.exists() {
                continue;
            }
            fs::create_dir_all(to.parent().context("a library has no directory")?)?;
            fs::copy(&library, to).with_context(|| format!("copying {}", library.display()))?;
        }
    }
    Ok(())
}

/// Returns the shared libraries of a program and the dynamic loader.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let text = process::run(Command::new("ldd").arg(program))?;
    // `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)`, `/lib64/ld-linux-x86-64.so.2 (0x…)`
    let path = |line: &str| line.split_whitespace().find(|w| w.starts_with('/')).map(PathBuf::from);
    Ok(text.lines().filter_map(path).collect())
}

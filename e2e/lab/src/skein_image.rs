//! The container image, made without a registry: static programs in the Dockerfile's last stage.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::cargo;
use crate::process;

/// The image's name, as the chart's values have it.
pub const REFERENCE: &str = concat!("skein:", env!("CARGO_PKG_VERSION"));
/// How long copying and packing may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Builds the programs as they ship and the image; an archive as `docker save` writes one, for
/// `ctr -n k8s.io images import`.
pub fn build() -> Result<PathBuf> {
    let programs = cargo::build_static(&["skein-agent", "skein-cni"])?;
    let directory = programs[0].parent().context("a program without a directory")?;
    let archive = directory.join("skein-image.tar");
    pack(directory, &archive)?;
    Ok(archive)
}

/// Makes the archive from the programs in a directory: the same bytes from the same programs.
pub fn pack(programs: &Path, archive: &Path) -> Result<()> {
    let workspace = cargo::workspace();
    let work = tempfile::tempdir()?;
    let root = work.path().join("dist");
    finish(Command::new(workspace.join(".ci/image-root")).arg(programs).arg(&root))?;
    let version = concat!("VERSION=", env!("CARGO_PKG_VERSION"));
    // No time of today in it, and no mount that could be left.
    let how = ["bud", "--isolation=chroot", "--timestamp=0", "--target=from-binaries"];
    let mut bud = buildah(work.path());
    bud.args(how).args(["--quiet", "--build-arg", version, "--tag", REFERENCE, "--file"]);
    finish(bud.arg(workspace.join("Dockerfile")).arg(work.path()))?;
    let new = archive.with_extension("new");
    // It refuses to write into what an interrupted run left.
    let _ = fs::remove_file(&new);
    let to = format!("docker-archive:{}:{REFERENCE}", new.display());
    finish(buildah(work.path()).args(["push", "--quiet", REFERENCE, &to]))?;
    fs::rename(&new, archive).with_context(|| archive.display().to_string())
}

/// With all its files in a directory of ours, and a way to store them that mounts nothing.
fn buildah(work: &Path) -> Command {
    let mut command = Command::new("buildah");
    command.arg("--root").arg(work.join("storage")).arg("--runroot").arg(work.join("run"));
    command.args(["--storage-driver", "vfs"]);
    command
}

fn finish(command: &mut Command) -> Result<()> {
    let what = process::describe(command);
    let finished = process::finish(command, &[], LIMIT)?;
    if finished.code != 0 {
        bail!("`{what}` ended with code {}: {}", finished.code, finished.stderr.trim());
    }
    Ok(())
}

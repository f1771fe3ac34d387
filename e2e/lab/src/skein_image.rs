//! The container image of Skein, built without a registry: static programs and the last stage of
//! the Dockerfile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::cargo;
use crate::process;

/// Name of the image, equal to the one in the chart's values.
pub const REFERENCE: &str = concat!("skein:", env!("CARGO_PKG_VERSION"));
/// Maximum time of one command that copies or packs files.
const PACK_TIMEOUT: Duration = Duration::from_secs(120);

/// Builds the programs with the profile `dist` and the image. Returns the path of an archive in the
/// format of `docker save`, for `ctr -n k8s.io images import`.
///
/// # Errors
/// If a program cannot be built, or if the image cannot be packed.
pub fn build() -> Result<PathBuf> {
    let programs = cargo::build_static(&["skein-agent", "skein-cni"])?;
    let directory = programs[0].parent().context("a program without a directory")?;
    let archive = directory.join("skein-image.tar");
    pack(directory, &archive)?;
    Ok(archive)
}

/// Packs the programs in a directory into an archive. Equal programs make equal archives.
///
/// # Errors
/// If the directory lacks a program, or if buildah fails.
pub fn pack(programs: &Path, archive: &Path) -> Result<()> {
    let workspace = cargo::workspace();
    let work = tempfile::tempdir()?;
    let root = work.path().join("dist");
    finish(Command::new(workspace.join(".ci/image-root")).arg(programs).arg(&root))?;
    let version = concat!("VERSION=", env!("CARGO_PKG_VERSION"));
    // A fixed timestamp makes the archive reproducible; chroot isolation leaves no mount behind.
    let options = ["bud", "--isolation=chroot", "--timestamp=0", "--target=from-binaries"];
    let mut bud = buildah(work.path());
    bud.args(options).args(["--quiet", "--build-arg", version, "--tag", REFERENCE, "--file"]);
    finish(bud.arg(workspace.join("Dockerfile")).arg(work.path()))?;
    let new = archive.with_extension("new");
    // buildah refuses to overwrite the file of an interrupted run.
    let _ = fs::remove_file(&new);
    let to = format!("docker-archive:{}:{REFERENCE}", new.display());
    finish(buildah(work.path()).args(["push", "--quiet", REFERENCE, &to]))?;
    fs::rename(&new, archive).with_context(|| archive.display().to_string())
}

/// Returns a buildah command that keeps its storage in `work`, with a driver that mounts nothing.
fn buildah(work: &Path) -> Command {
    let mut command = Command::new("buildah");
    command.arg("--root").arg(work.join("storage")).arg("--runroot").arg(work.join("run"));
    command.args(["--storage-driver", "vfs"]);
    command
}

fn finish(command: &mut Command) -> Result<()> {
    let what = process::describe(command);
    let finished = process::finish(command, &[], PACK_TIMEOUT)?;
    if finished.code != 0 {
        bail!("`{what}` ended with code {}: {}", finished.code, finished.stderr.trim());
    }
    Ok(())
}

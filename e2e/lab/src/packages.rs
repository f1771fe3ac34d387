//! Programs from Debian's packages: the programs that each command needs, and their installation.
//!
//! A file with the right name can be the wrong program: nearly every Debian host has a `busybox`,
//! but few hosts have a `busybox` that runs in an empty root directory. The check therefore
//! includes a property of the file ([`Property`]). A file without the property counts as missing,
//! and the messages name the file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::console::Console;
use crate::{elf, process, registry};

/// A required program and the Debian package that contains it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Name of the program, or absolute path of a file.
    pub program: &'static str,
    /// Name of the Debian package.
    pub package: &'static str,
    /// Property of the file that the package has, and that another file of this name may lack.
    pub property: Property,
}

/// Property that a needed file must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// No property: any file of this name will do.
    Present,
    /// A statically linked program, which runs in an empty root directory.
    Static,
    /// A program of the upstream project with this name. The output of `-V` contains the name.
    Of(&'static str),
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package, property: Property::Present }
}

/// The busybox of container images, whose root directory has no library.
pub const BUSYBOX: Need =
    Need { program: "busybox", package: "busybox-static", property: Property::Static };

/// Programs of the demonstration: network namespaces, interfaces, pings and throughput.
pub const DEMO: &[Need] = &[
    // busybox and inetutils have programs of these names, with other options.
    Need { program: "ip", package: "iproute2", property: Property::Of("iproute2") },
    need("ethtool", "ethtool"),
    Need { program: "ping", package: "iputils-ping", property: Property::Of("iputils") },
    need("iperf3", "iperf3"),
];

/// Programs of the tests, in addition to [`DEMO`].
pub const TEST: &[Need] = &[
    need("prometheus", "prometheus"),
    need("promtool", "prometheus"),
    need("chromium", "chromium"),
    need("chromedriver", "chromium-driver"),
    need("nft", "nftables"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    BUSYBOX,
    need("tcpdump", "tcpdump"),
    need("mandoc", "mandoc"),
    need("tmux", "tmux"),
    // The plugins are not in a directory of `PATH`.
    need("/usr/lib/cni/portmap", "containernetworking-plugins"),
    need("iptables", "iptables"),
    need("conntrack", "conntrack"),
    need("go", "golang-go"),
    need(
        "/usr/share/gocode/src/github.com/containernetworking/cni/libcni/api.go",
        "golang-github-appc-cni-dev",
    ),
    need("/lib/systemd/systemd-networkd", "systemd"),
    need("udevadm", "udev"),
    // For the container image, and for the programs of `programs.rs`.
    need("buildah", "buildah"),
    need("/usr/share/doc/python3-venv/copyright", "python3-venv"),
];

/// Programs of a cluster, in addition to [`DEMO`].
pub const CLUSTER: &[Need] = &[
    need("etcd", "etcd-server"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    BUSYBOX,
    need("/usr/lib/cni/portmap", "containernetworking-plugins"),
    need("iptables", "iptables"),
    need("conntrack", "conntrack"),
    need("nft", "nftables"),
    need("curl", "curl"),
    need("openssl", "openssl"),
];

/// Programs that build a cluster's programs.
pub const CLUSTER_BUILD: &[Need] = &[
    need("go", "golang-go"),
    need(
        "/usr/share/gocode/src/github.com/modern-go/reflect2/reflect2.go",
        "golang-github-modern-go-reflect2-dev",
    ),
    need("pip3", "python3-pip"),
    need("unzip", "unzip"),
];

/// Programs of the benchmark, in addition to [`DEMO`].
pub const BENCH: &[Need] =
    &[need("redis-server", "redis-server"), need("redis-benchmark", "redis-tools")];

/// Programs of the soak test, in addition to [`DEMO`].
pub const SOAK: &[Need] = &[need("nft", "nftables")];

/// Programs of the overlays with which the benchmark compares Skein. It reports an overlay that
/// cannot be installed, and continues without it.
pub const BASELINES: &[Need] = &[
    need("wireguard-go", "wireguard-go"),
    need("wg", "wireguard-tools"),
    need("nebula", "nebula"),
    need("nebula-cert", "nebula"),
];

impl Need {
    /// Returns the path of a file that has the required property. Without one, returns the reason:
    /// "not installed", or the file of this name and the property that it lacks.
    fn find(&self) -> Result<PathBuf, String> {
        self.find_in(directories())
    }

    fn find_in(&self, directories: impl Iterator<Item = PathBuf>) -> Result<PathBuf, String> {
        let mut reason = "not installed".to_owned();
        for path in directories.map(|directory| directory.join(self.program)) {
            if !path.is_file() {
                continue;
            }
            match self.property.check(&path) {
                Ok(()) => return Ok(path),
                Err(lack) => reason = format!("{} is not {lack}", path.display()),
            }
            // Only static programs are used by their paths. The others are started by their names,
            // which lead to the first file.
            if self.property != Property::Static {
                break;
            }
        }
        Err(reason)
    }
}

impl Property {
    /// Checks an existing file. The error completes the sentence "the file is not …".
    fn check(self, path: &Path) -> Result<(), String> {
        match self {
            Self::Present => Ok(()),
            Self::Static if elf::is_static(path).unwrap_or(false) => Ok(()),
            Self::Static => Err("a statically linked program".to_owned()),
            Self::Of(project) => {
                let printed = process::finish(Command::new(path).arg("-V"), &[], VERSION_TIMEOUT);
                let is_of =
                    printed.is_ok_and(|said| (said.stdout + &said.stderr).contains(project));
                is_of.then_some(()).ok_or_else(|| format!("the program of {project}"))
            }
        }
    }
}

/// Maximum time for a program to print its version.
const VERSION_TIMEOUT: Duration = Duration::from_secs(30);

/// Directories in which a shell of root looks for programs, in its order.
fn directories() -> impl Iterator<Item = PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let own: Vec<_> = std::env::split_paths(&path).collect();
    own.into_iter().chain(system.map(PathBuf::from))
}

/// Returns the path of a program, as a shell of root would find it.
pub fn find(program: &str) -> Option<PathBuf> {
    directories().map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Returns the path of a needed program.
///
/// # Errors
///
/// Returns an error if no file has the required property. The message names the package and the
/// file that lacks the property.
pub fn path(need: &Need) -> Result<PathBuf> {
    let advice = || format!("the Debian package {} has {}", need.package, need.program);
    need.find().map_err(|reason| anyhow!("{}: {reason}; {}", need.program, advice()))
}

/// Installs the packages of all programs that are missing or lack the required property, and prints
/// their names.
///
/// # Errors
///
/// Returns an error if a package cannot be installed, or if it contains no file with the required
/// property.
pub fn ensure(needs: &[&[Need]], console: &Console) -> Result<()> {
    let missing: Vec<(Need, String)> = needs
        .iter()
        .copied()
        .flatten()
        .filter_map(|need| Some((*need, need.find().err()?)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|(need, _)| need.package).collect();
    packages.dedup();
    let list = packages.join(" ");
    let reasons: Vec<_> =
        missing.iter().map(|(need, reason)| format!("{}: {reason}", need.program)).collect();
    let reasons = reasons.join(", ");
    let by_hand = format!("{reasons}. Install them manually: apt-get install {list}");
    if find("apt-get").is_none() {
        bail!("no apt-get on this host ({reasons}). Install the Debian packages {list}.");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("installing Debian packages needs root: {by_hand}");
    }
    console.step(&format!("installing Debian packages: {list} ({reasons})"));
    let _quiet = NoServices::new();
    if install(&packages).is_err() {
        // A new machine has no package lists.
        apt(&["update"])?;
        install(&packages).with_context(|| by_hand.clone())?;
    }
    missing.iter().try_for_each(|(need, _)| path(need).map(drop))
}

/// Installs packages as [`ensure`] does, but each separately: the failure of one does not prevent
/// the installation of the others. Returns the error messages.
pub fn ensure_each(needs: &[Need], console: &Console) -> Vec<String> {
    let mut packages: Vec<&str> = needs.iter().map(|need| need.package).collect();
    packages.dedup();
    let one = |package: &str| {
        let of_it = |need: &&Need| need.package == package;
        let needs: Vec<Need> = needs.iter().filter(of_it).copied().collect();
        ensure(&[&needs], console).err().map(|error| format!("{package}: {error:#}"))
    };
    packages.into_iter().filter_map(one).collect()
}

fn install(packages: &[&str]) -> Result<()> {
    let arguments = ["install", "--yes", "--no-install-recommends"];
    apt(&[&arguments[..], packages].concat())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.arg("--quiet=2").args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
    let output = command.output().context("starting apt-get")?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("apt-get {}: {}", arguments.join(" "), text.trim());
    }
    Ok(())
}

/// A guard that keeps packages from starting their services (redis, prometheus) during the
/// installation, by means of `/usr/sbin/policy-rc.d`.
struct NoServices(Option<&'static Path>);

impl NoServices {
    fn new() -> Self {
        let policy = Path::new("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Self(None);
        }
        // The file must also be removed after a signal: it would keep every service of this host
        // from starting.
        registry::register_file(policy);
        let written = fs::write(policy, "#!/bin/sh\nexit 101\n").and_then(|()| {
            fs::set_permissions(policy, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        });
        Self(written.is_ok().then_some(policy))
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if let Some(policy) = self.0 {
            registry::remove_file(policy);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use anyhow::ensure;

    use super::*;

    /// Creates a directory with a `busybox` that is `program`.
    fn directory_with(program: &Path) -> Result<tempfile::TempDir> {
        let directory = tempfile::tempdir()?;
        symlink(program, directory.path().join("busybox"))?;
        Ok(directory)
    }

    #[test]
    fn static_busybox_behind_a_dynamic_one_is_used() -> Result<()> {
        let dynamic = directory_with(&std::env::current_exe()?)?;
        let program = tempfile::NamedTempFile::new()?;
        fs::write(program.path(), elf::STATIC_EXAMPLE)?;
        let linked = directory_with(program.path())?;
        let paths = [dynamic.path(), linked.path()].map(Path::to_owned);

        let found = BUSYBOX.find_in(paths.clone().into_iter());
        ensure!(found == Ok(linked.path().join("busybox")), "{found:?} was taken");
        let found = BUSYBOX.find_in(paths.into_iter().take(1));
        let wrong = dynamic.path().join("busybox");
        let reason = format!("{} is not a statically linked program", wrong.display());
        ensure!(found == Err(reason), "the dynamic program is not named: {found:?}");
        Ok(())
    }

    #[test]
    fn program_of_another_project_is_named() -> Result<()> {
        let directory = directory_with(Path::new("/bin/echo"))?;
        let paths = || std::iter::once(directory.path().to_owned());
        let of = |project| Need { property: Property::Of(project), ..BUSYBOX };
        // `echo -V` prints its argument.
        ensure!(of("-V").find_in(paths()).is_ok(), "the right program is refused");
        let reason = of("iputils").find_in(paths()).err().unwrap_or_default();
        ensure!(reason.ends_with("busybox is not the program of iputils"), "{reason}");
        Ok(())
    }

    #[test]
    fn absent_program_is_not_installed() -> Result<()> {
        let empty = tempfile::tempdir()?;
        let found = BUSYBOX.find_in(std::iter::once(empty.path().to_owned()));
        ensure!(found == Err("not installed".to_owned()), "an absent program is {found:?}");
        Ok(())
    }
}

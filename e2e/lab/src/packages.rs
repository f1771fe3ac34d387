//! Programs from Debian's packages: which are needed, which are missing, and how they come.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::console::Console;
use crate::registry;

/// A program and the package that has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// Name of the program.
    pub program: &'static str,
    /// Debian's package.
    pub package: &'static str,
}

const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// To make namespaces and to show what they do.
pub const DEMO: &[Need] = &[
    need("ip", "iproute2"),
    need("ethtool", "ethtool"),
    need("ping", "iputils-ping"),
    need("iperf3", "iperf3"),
];

/// For the tests, beside [`DEMO`].
pub const TEST: &[Need] = &[
    need("prometheus", "prometheus"),
    need("promtool", "prometheus"),
    need("chromium", "chromium"),
    need("chromedriver", "chromium-driver"),
    need("nft", "nftables"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    need("busybox", "busybox-static"),
    need("tcpdump", "tcpdump"),
    need("mandoc", "mandoc"),
    need("tmux", "tmux"),
    // Beside its programs, which are elsewhere.
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
    // The image, and the programs that come from Python's packages.
    need("buildah", "buildah"),
    need("/usr/share/doc/python3-venv/copyright", "python3-venv"),
];

/// For a cluster, beside [`DEMO`].
pub const CLUSTER: &[Need] = &[
    need("etcd", "etcd-server"),
    need("containerd", "containerd"),
    need("runc", "runc"),
    need("busybox", "busybox-static"),
    need("/usr/lib/cni/portmap", "containernetworking-plugins"),
    need("iptables", "iptables"),
    need("conntrack", "conntrack"),
    need("nft", "nftables"),
    need("curl", "curl"),
    need("openssl", "openssl"),
];

/// To build a cluster's programs.
pub const CLUSTER_BUILD: &[Need] = &[
    need("go", "golang-go"),
    need(
        "/usr/share/gocode/src/github.com/modern-go/reflect2/reflect2.go",
        "golang-github-modern-go-reflect2-dev",
    ),
    need("pip3", "python3-pip"),
    need("unzip", "unzip"),
];

/// For the benchmark, beside [`DEMO`].
pub const BENCH: &[Need] =
    &[need("redis-server", "redis-server"), need("redis-benchmark", "redis-tools")];

/// For the soak, beside [`DEMO`].
pub const SOAK: &[Need] = &[need("nft", "nftables")];

/// Other overlays to compare with: the benchmark says so and goes on where one cannot be had.
pub const RIVALS: &[Need] = &[
    need("wireguard-go", "wireguard-go"),
    need("wg", "wireguard-tools"),
    need("nebula", "nebula"),
    need("nebula-cert", "nebula"),
];

/// The path of a program, as a shell of root would find it.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];
    let directories = std::env::split_paths(&path).chain(system.map(PathBuf::from));
    directories.map(|directory| directory.join(program)).find(|path| path.is_file())
}

/// Installs the packages of all programs that are missing, and says so.
pub fn ensure(needs: &[&[Need]], console: &Console) -> Result<()> {
    let missing: Vec<Need> =
        needs.iter().copied().flatten().copied().filter(|n| find(n.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|n| n.package).collect();
    packages.dedup();
    let list = packages.join(" ");
    let by_hand = format!("install by hand: apt-get install {list}");
    if find("apt-get").is_none() {
        bail!("missing programs, and no apt-get to install them; the Debian packages are: {list}");
    }
    if !rustix::process::geteuid().is_root() {
        bail!("missing Debian packages, and installing them needs root; {by_hand}");
    }
    console.step(&format!("installing Debian packages: {list}"));
    let _quiet = NoServices::new();
    if install(&packages).is_err() {
        // Fresh machines have no package lists.
        apt(&["update"])?;
        install(&packages).with_context(|| by_hand.clone())?;
    }
    match missing.iter().find(|need| find(need.program).is_none()) {
        Some(need) => bail!("{} is still missing after installing {list}", need.program),
        None => Ok(()),
    }
}

/// As [`ensure`], package by package: one that cannot be had does not keep the others away. What
/// went wrong, in words.
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

/// While it lives, packages with a service (redis, prometheus) are installed without starting it.
struct NoServices(Option<&'static Path>);

impl NoServices {
    fn new() -> Self {
        let policy = Path::new("/usr/sbin/policy-rc.d");
        if policy.exists() {
            return Self(None);
        }
        // Also on an interrupt: left behind, it would keep every service of this host from starting.
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

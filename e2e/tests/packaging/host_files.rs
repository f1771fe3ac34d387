//! Files in `agent/packaging` for managers of network interfaces, tested with these managers.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_lab::cargo::workspace;
use skein_lab::process;

/// Maximum time of one run of the managers.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// Script that creates one interface of each kind and a foreign one, and runs udev's link setup and
/// systemd-networkd for 4 s in their own network and mount namespaces. `$1` is `agent/packaging`. A
/// catch-all file would configure every interface.
const SCRIPT: &str = r#"
set -e
ip link set lo up
ip link add skp12345678901 type veth peer name other0
ip link add sk-0123456789ab type bridge
ip tuntap add skein0 mode tun
mount -t tmpfs none /run
mkdir -p /run/systemd/network /run/systemd/netif/links /run/udev
chown -R systemd-network /run/systemd/netif
cp "$1/systemd-networkd.network" /run/systemd/network/05-skein.network
cp "$1/systemd-udev.link" /run/systemd/network/05-skein.link
printf '[Match]\nName=*\n[Network]\nAddress=192.0.2.77/32\n' >/run/systemd/network/90-all.network
mount -t sysfs none /sys
for name in skp12345678901 skein0 other0; do
    udevadm test-builtin net_setup_link "/sys/class/net/$name" 2>&1
done
# A read-only /sys has systemd-networkd do without udev.
mount -o remount,ro /sys
export SYSTEMD_LOG_LEVEL=debug SYSTEMD_LOG_TARGET=console
timeout 4 /lib/systemd/systemd-networkd 2>&1 || [ $? = 124 ]
"#;

fn file(name: &str) -> Result<String> {
    let path = workspace().join("agent/packaging").join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

#[test]
fn networkd_and_udev_leave_our_interfaces_unmanaged() -> Result<()> {
    let networkd = "/lib/systemd/systemd-networkd";
    ensure!(Path::new(networkd).exists(), "{networkd} is missing: apt-get install systemd");
    let mut command = Command::new("unshare");
    command.args(["--net", "--mount", "bash", "-c", SCRIPT, "bash"]);
    command.arg(workspace().join("agent/packaging"));
    let finished = process::finish(&mut command, &[], RUN_TIMEOUT)?;
    let log = finished.stdout;
    ensure!(
        finished.code == 0,
        "The script failed with code {}: {log}{}",
        finished.code,
        finished.stderr
    );
    for name in ["skp12345678901", "sk-0123456789ab", "skein0"] {
        let line = format!("{name}: State changed: initialized -> unmanaged");
        ensure!(log.contains(&line), "systemd-networkd manages {name}: {log}");
    }
    for name in ["skp12345678901", "skein0"] {
        let line = format!("{name}: Config file /run/systemd/network/05-skein.link is applied");
        ensure!(log.contains(&line), "udev uses another link file for {name}: {log}");
    }
    ensure!(
        log.contains("other0: found matching network '/run/systemd/network/90-all.network'"),
        "systemd-networkd must manage foreign interfaces: {log}"
    );
    ensure!(!log.contains("05-skein.network:"), "systemd-networkd refuses a line: {log}");
    ensure!(!log.contains("05-skein.link:"), "udev refuses a line: {log}");
    Ok(())
}

/// NetworkManager itself does not run here, because it needs a message bus.
#[test]
fn files_for_all_managers_list_the_same_interfaces() -> Result<()> {
    let names = ["skein0", "skp*", "sk-*"];
    let joined =
        |prefix: &str, separator: &str| names.map(|name| format!("{prefix}{name}")).join(separator);
    let network_manager = file("NetworkManager.conf")?;
    let matches = format!("match-device={}\nmanaged=0\n", joined("interface-name:", ","));
    let is_listed = network_manager.contains(&matches);
    ensure!(is_listed, "NetworkManager.conf lists other interfaces: {network_manager}");
    let networkd = file("systemd-networkd.network")?;
    let is_listed = networkd.contains(&format!("Name={}\n", joined("", " ")));
    ensure!(is_listed, "systemd-networkd.network lists other interfaces: {networkd}");
    let udev = file("systemd-udev.link")?;
    let is_listed = udev.contains(&format!("OriginalName={}\n", joined("", " ")));
    ensure!(is_listed, "systemd-udev.link lists other interfaces: {udev}");
    Ok(())
}

/// Returns the command lines of the step with this name in a workflow.
fn step(workflow: &str, name: &str) -> Result<String> {
    let begin = format!("- name: {name}\n");
    let (_, rest) = workflow.split_once(&begin).with_context(|| format!("no step {name}"))?;
    let step = rest.split("- name: ").next().unwrap_or_default();
    let (_, lines) = step.split_once("run:").with_context(|| format!("{name} runs nothing"))?;
    let lines = lines.trim_start_matches(" |").lines().map(str::trim);
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

#[test]
fn releases_check_advisories_and_pin_the_base_image() -> Result<()> {
    let read =
        |path: &str| std::fs::read_to_string(workspace().join(path)).context(path.to_owned());
    let (ci, release) = (read(".github/workflows/ci.yml")?, read(".github/workflows/release.yml")?);
    for workflow in [&ci, &release] {
        ensure!(!workflow.contains("uses:"), "A workflow uses an action: {workflow}");
    }
    let fetches = ci.contains("SKEIN_ADVISORIES=fetch .ci/run");
    ensure!(fetches, "ci.yml does not fetch the advisories: {ci}");
    let advisories = step(&release, "advisories")?;
    let checks = advisories.contains("cargo deny --all-features check advisories");
    ensure!(checks, "release.yml does not check the advisories: {advisories}");
    let dockerfile = read("Dockerfile")?;
    let mut stages = Vec::new();
    for line in dockerfile.lines().filter(|line| line.starts_with("FROM ")) {
        let mut words = line.split_whitespace().skip(1);
        let image = words.next().context("FROM without an image")?;
        let known = image == "scratch" || image == "${BUILD_IMAGE}" || stages.contains(&image);
        ensure!(known, "The release workflow does not pin {image}.");
        stages.extend(words.nth(1));
    }
    let pin = step(&release, "base image pinned by digest")?;
    let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
    let outputs = tempfile::tempdir()?;
    let run = |digest: &str| {
        let mut command = Command::new("sh");
        command.args(["-e", "-c", &pin]).current_dir(workspace());
        command.env("BUILD_IMAGE_DIGEST", digest).env("GITHUB_ENV", outputs.path().join("env"));
        process::finish(&mut command, &[], RUN_TIMEOUT)
    };
    for bad in ["", "latest", "sha256:12", &format!("{digest}0"), &format!("x\n{digest} y")] {
        ensure!(run(bad)?.code == 1, "The digest {bad:?} is accepted.");
    }
    ensure!(run(&digest)?.code == 0, "The valid digest is refused.");
    let image = std::fs::read_to_string(outputs.path().join("env"))?;
    let expected = format!("@{digest}\n");
    let is_pinned = image.starts_with("BUILD_IMAGE=rust:") && image.ends_with(&expected);
    ensure!(is_pinned, "The image is not pinned: {image}");
    Ok(())
}

//! The files of `agent/packaging` for managers of network interfaces, tested with these managers.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use skein_e2e::cargo::workspace;
use skein_e2e::lab::process;

/// Time limit of one run of the managers.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// Makes one interface of each kind and a foreign one, and runs udev's link setup and
/// systemd-networkd for 4 s in network and mount namespaces of their own. `$1`: `agent/packaging`.
/// A catch-all file would configure every interface.
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
    ensure!(finished.code == 0, "exit code {}: {log}{}", finished.code, finished.stderr);
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

/// NetworkManager itself is not run here: it needs a message bus.
#[test]
fn every_manager_is_told_of_the_same_interfaces() -> Result<()> {
    let names = ["skein0", "skp*", "sk-*"];
    let joined =
        |prefix: &str, separator: &str| names.map(|name| format!("{prefix}{name}")).join(separator);
    let network_manager = file("NetworkManager.conf")?;
    let matches = format!("match-device={}\nmanaged=0\n", joined("interface-name:", ","));
    ensure!(network_manager.contains(&matches), "{network_manager}");
    let networkd = file("systemd-networkd.network")?;
    ensure!(networkd.contains(&format!("Name={}\n", joined("", " "))), "{networkd}");
    let udev = file("systemd-udev.link")?;
    ensure!(udev.contains(&format!("OriginalName={}\n", joined("", " "))), "{udev}");
    Ok(())
}

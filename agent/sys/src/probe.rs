//! Probes of the host for `skein-agent check`: kernel version, capabilities, offloads, confinement.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use super::fallback::{Fallback, Feature};
use super::in_new_network_namespace;
use super::tun::{self, OpenQueues, TunOffload};
use super::udp::{self, UdpOptions};
use super::{landlock, seccomp};

/// Result of one probe of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// Name of the probe. Names are stable, because scripts use them.
    pub name: &'static str,
    /// True if the host has the feature.
    pub ok: bool,
    /// Finding, or the reason of the failure and its remedy.
    pub detail: String,
    /// True if the agent cannot run without the feature. Other features affect speed or
    /// confinement.
    pub required: bool,
}

/// Reason why a feature is missing or cannot be probed, with its remedy.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("cannot parse the kernel version \"{0}\"")]
    Release(String),
    #[error("Linux {release} is too old: use {}.{} or later", .oldest.0, .oldest.1)]
    OldKernel { release: String, oldest: (u32, u32) },
    #[error("missing: run as root or grant it, {purpose}")]
    NoCapability { purpose: &'static str },
    #[error("cannot read this process's capabilities: {source}")]
    Capabilities { source: io::Error },
    #[error("the host does not support IPv6: the agent listens on IPv4 only")]
    NoIpv6,
    #[error("the processor has no AES instructions: ChaCha20-Poly1305 is used")]
    NoAes,
    #[error("{}", .0.reason)]
    Fallback(Fallback),
    #[error(transparent)]
    Tun(#[from] tun::TunError),
    #[error(transparent)]
    Udp(#[from] udp::UdpError),
    #[error(transparent)]
    Io(io::Error),
}

impl From<Fallback> for ProbeError {
    fn from(fallback: Fallback) -> Self {
        Self::Fallback(fallback)
    }
}

/// Oldest supported kernel version. UDP_GRO exists since 5.0; 5.4 is the next long-term release.
const OLDEST_KERNEL: (u32, u32) = (5, 4);

// Bits of linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Runs all probes. Devices and sockets are created in a temporary network namespace, so that the
/// configuration of the host does not change.
pub fn probe_all() -> Vec<Probe> {
    let mut probes = vec![
        kernel(),
        capability("cap_net_admin", CAP_NET_ADMIN, true, "to create the TUN device and its routes"),
        capability("cap_sys_admin", CAP_SYS_ADMIN, false, "to enter network namespaces"),
        ipv6(),
        option("udp_segment", "UDP_SEGMENT", Feature::UdpGso, udp::probe_gso()),
        option("udp_gro", "UDP_GRO", Feature::UdpGro, udp::probe_gro()),
        aes(),
        mechanism("seccomp", seccomp::probe()),
        mechanism("landlock", landlock::probe()),
    ];
    match in_new_network_namespace(|| [tun_device(), lanes()].concat()) {
        Ok(found) => probes.extend(found),
        Err(error) => probes.push(Probe {
            name: "scratch_namespace",
            ok: false,
            detail: format!(
                "cannot create a temporary network namespace, so that the TUN device and the lanes' \
                 sockets were not probed: {error}. Run the command as root."
            ),
            required: false,
        }),
    }
    probes
}

fn result(name: &'static str, required: bool, result: Result<String, ProbeError>) -> Probe {
    let ok = result.is_ok();
    Probe { name, ok, detail: result.unwrap_or_else(|error| error.to_string()), required }
}

/// Reports a socket option of this name, whose probe has the result `probed`.
fn option(name: &'static str, option: &str, feature: Feature, probed: io::Result<()>) -> Probe {
    let found = probed.map(|()| format!("{option} works"));
    result(name, false, found.map_err(|error| Fallback::refused(feature, &error).into()))
}

/// Reports a mechanism that confines the data process.
fn mechanism(name: &'static str, probed: io::Result<()>) -> Probe {
    let found = probed.map(|()| "confines the data process".into());
    result(name, false, found.map_err(ProbeError::Io))
}

fn kernel() -> Probe {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease");
    let checked = release.map_err(ProbeError::Io).and_then(|release| check_release(&release));
    result("kernel", true, checked)
}

fn check_release(release: &str) -> Result<String, ProbeError> {
    let release = release.trim();
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    let (Some(major), Some(minor)) = (numbers.next(), numbers.next()) else {
        return Err(ProbeError::Release(release.to_owned()));
    };
    if (major, minor) < OLDEST_KERNEL {
        return Err(ProbeError::OldKernel { release: release.to_owned(), oldest: OLDEST_KERNEL });
    }
    Ok(format!("Linux {release}"))
}

fn capability(name: &'static str, bit: u32, required: bool, purpose: &'static str) -> Probe {
    let held = fs::read_to_string("/proc/thread-self/status").and_then(|status| {
        let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        u64::from_str_radix(line.unwrap_or_default().trim(), 16).map_err(io::Error::other)
    });
    result(
        name,
        required,
        match held {
            Ok(mask) if mask & (1 << bit) != 0 => Ok("held".into()),
            Ok(_) => Err(ProbeError::NoCapability { purpose }),
            Err(source) => Err(ProbeError::Capabilities { source }),
        },
    )
}

fn ipv6() -> Probe {
    let found = match udp::is_family_supported(Ipv6Addr::UNSPECIFIED.into()) {
        true => Ok("IPv6 sockets can be created".into()),
        false => Err(ProbeError::NoIpv6),
    };
    result("ipv6", false, found)
}

fn aes() -> Probe {
    #[cfg(target_arch = "x86_64")]
    let found = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    let found = std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = false;
    result(
        "aes_hardware",
        false,
        if found {
            Ok("the processor has AES instructions".into())
        } else {
            Err(ProbeError::NoAes)
        },
    )
}

/// Creates a device, attaches two queues, and reports the enabled offloads.
fn tun_device() -> Vec<Probe> {
    const NAME: &str = "skeinprobe0";
    let opened =
        tun::create_persistent(NAME).and_then(|()| tun::open_queues(NAME, 2, TunOffload::ALL));
    let OpenQueues { queues: _queues, fallbacks, .. } = match opened {
        Ok(opened) => opened,
        Err(error) => return vec![result("tun", true, Err(error.into()))],
    };
    vec![
        result("tun", true, Ok("multi-queue device with vnet header".into())),
        feature(&fallbacks, Feature::TunChecksum, "works"),
        feature(&fallbacks, Feature::TunTso, "works"),
        feature(&fallbacks, Feature::TunUso, "works"),
    ]
}

/// Binds the sockets of two lanes and reports refused features and small buffers.
fn lanes() -> Vec<Probe> {
    const BUFFER: usize = 8 << 20;
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let options = UdpOptions { receive_buffer: BUFFER, send_buffer: BUFFER, gro: true, ecn: true };
    let fallbacks = match udp::bind_lanes(address, 2, &options) {
        Ok((_, fallbacks)) => fallbacks,
        Err(error) => return vec![result("udp", true, Err(error.into()))],
    };
    let probe = |wanted, works| feature(&fallbacks, wanted, works);
    vec![
        result("udp", true, Ok("sockets can be bound".into())),
        probe(Feature::UdpEcn, "the ECN field of received datagrams is reported"),
        probe(Feature::ReuseportSteering, "the kernel distributes datagrams by their lane number"),
        probe(Feature::ReceiveBuffer, "8 MiB are available"),
        probe(Feature::SendBuffer, "8 MiB are available"),
    ]
}

/// Reports a feature, which is missing if there is a fallback of it.
fn feature(fallbacks: &[Fallback], feature: Feature, works: &str) -> Probe {
    let fallback = fallbacks.iter().find(|fallback| fallback.feature == feature);
    let found = fallback.map_or_else(|| Ok(works.into()), |found| Err(found.clone().into()));
    result(feature.label(), false, found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_version_is_accepted_from_5_4() {
        for good in ["5.4.0-generic\n", "5.10", "6.18.44-fc-v669", "7.0.0-rc1"] {
            assert!(check_release(good).is_ok(), "{good}");
        }
        for bad in ["5.3.18", "4.19.0", "", "Linux"] {
            assert!(check_release(bad).is_err(), "{bad}");
        }
    }
}

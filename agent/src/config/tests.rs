//! Tests of the whole configuration file.

use std::net::{IpAddr, Ipv4Addr};

use skein_ipc::CipherChoice;

use super::underlay::wildcard;
use super::*;
use crate::logging::LogFormat;

fn error(text: &str) -> String {
    Config::parse(text).unwrap_err().to_string()
}

#[test]
fn every_key_has_a_default() {
    let config = Config::parse("").unwrap();
    assert!(!config.name.is_empty());
    assert_eq!(config.interface.name, "skein0");
    assert_eq!(config.underlay.port, 51900);
    assert_eq!(config.underlay.addresses[0], IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    assert!((1..=4).contains(&config.dataplane.lanes));
    assert_eq!(config.offload, OffloadSettings::ALL);
    assert_eq!(config.metrics.listen, Some("127.0.0.1:9464".parse().unwrap()));
    assert_eq!(
        config.status_page.listen, None,
        "The status page must be off unless it is configured."
    );
    assert_eq!(config.key_path(), Path::new("/var/lib/skein/node.key"));
}

#[test]
fn default_underlay_leaves_absent_families_out() {
    let (addresses, notes) = wildcard(|ip| ip.is_ipv4());
    assert_eq!(addresses, [IpAddr::V4(Ipv4Addr::UNSPECIFIED)]);
    assert_eq!(notes.len(), 1, "one family is absent: {notes:?}");
    assert!(notes[0].contains("no IPv6") && notes[0].contains("::"), "{notes:?}");
    let (addresses, notes) = wildcard(|_| true);
    assert_eq!((addresses.len(), notes.len()), (2, 0));
    let (addresses, _) = wildcard(|_| false);
    assert_eq!(addresses.len(), 2, "binding must report a host without any family");
    let explicit = Config::parse("[underlay]\naddresses = ['0.0.0.0', '::']").unwrap();
    assert_eq!(explicit.underlay.addresses.len(), 2, "explicit addresses must be kept");
    assert!(explicit.notes.is_empty());
}

#[test]
fn documented_defaults_match_code() {
    let reference = include_str!("../../../docs/configuration.md");
    let block = reference.split("```toml").nth(1).and_then(|rest| rest.split("```").next());
    let shown = Config::parse(block.unwrap()).unwrap();
    let mut defaults = Config::parse("name = 'node-a'").unwrap();
    defaults.dataplane.lanes = shown.dataplane.lanes;
    defaults.underlay.addresses = shown.underlay.addresses.clone();
    defaults.notes = shown.notes.clone();
    assert_eq!(shown, defaults);
}

#[test]
fn every_key_is_parsed() {
    let config = Config::parse(
        r#"
        name = "node-a"
        cluster_id = "prod"
        state_dir = "/tmp/state"
        private_key_file = "/tmp/key"
        nodes = "/tmp/nodes"
        pod_cidrs = ["10.1.0.0/24", "fd00::/64"]
        cluster_cidrs = ["10.0.0.0/8", "fd00::/16"]
        [interface]
        name = "sk1"
        mtu = 1400
        txqueuelen = 2000
        addresses = ["10.1.0.7"]
        forwarding = false
        unreachable_routes = false
        [underlay]
        addresses = ["192.0.2.1", "2001:db8::1"]
        port = 4000
        receive_buffer = 100000
        send_buffer = 200000
        [dataplane]
        mode = "external"
        socket = "/tmp/d.sock"
        lanes = 7
        cipher = "chacha20-poly1305"
        bundling = false
        keep_on_exit = true
        [offload]
        udp_gso = false
        [metrics]
        listen = "off"
        per_peer = true
        hosts = ["node-a.example"]
        [status_page]
        listen = "[::1]:9465"
        [control]
        socket = "/tmp/c.sock"
        [log]
        level = "debug"
        format = "json"
        "#,
    )
    .unwrap();
    assert_eq!(config.alias(), "skein:node-a");
    assert_eq!(config.cluster_cidrs.len(), 2);
    assert_eq!(config.interface.mtu, Some(1400));
    assert_eq!(config.interface.addresses, Some(vec!["10.1.0.7".parse().unwrap()]));
    assert!(!config.interface.unreachable_routes);
    assert_eq!(config.dataplane.mode, Mode::External);
    assert_eq!(config.dataplane.cipher, CipherChoice::Chacha20Poly1305);
    assert_eq!(config.offload, OffloadSettings { udp_gso: false, ..OffloadSettings::ALL });
    assert_eq!(config.metrics.listen, None);
    assert_eq!(config.metrics.hosts, ["node-a.example"]);
    assert_eq!(config.status_page.listen, Some("[::1]:9465".parse().unwrap()));
    assert_eq!(config.log.format, LogFormat::Json);
}

#[test]
fn required_confinement_contradicts_seccomp_off() {
    let parse = |text: &str| Config::parse(&format!("name = \"a\"\n[dataplane]\n{text}"));
    assert!(parse("require_confinement = true").unwrap().dataplane.require_confinement);
    assert!(!parse("seccomp = false").unwrap().dataplane.require_confinement);
    let error = parse("seccomp = false\nrequire_confinement = true").unwrap_err().to_string();
    assert!(error.contains("dataplane.require_confinement"), "{error}");
}

#[test]
fn ipv4_mapped_addresses_become_ipv4() {
    let config = Config::parse(
        r#"
        name = "node-a"
        pod_cidrs = ["::ffff:10.1.0.0/120"]
        cluster_cidrs = ["::ffff:10.0.0.0/104"]
        [interface]
        addresses = ["::ffff:10.1.0.7"]
        [underlay]
        addresses = ["::ffff:192.0.2.1"]
        [metrics]
        listen = "[::ffff:127.0.0.1]:9464"
        [status_page]
        listen = "[::ffff:127.0.0.1]:9465"
        [cni]
        no_masquerade = ["::ffff:198.51.100.0/120"]
        "#,
    )
    .unwrap();
    assert_eq!(config.pod_cidrs, Some(vec!["10.1.0.0/24".parse().unwrap()]));
    assert_eq!(config.cluster_cidrs, ["10.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.interface.addresses, Some(vec!["10.1.0.7".parse().unwrap()]));
    assert_eq!(config.underlay.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(config.metrics.listen, Some("127.0.0.1:9464".parse().unwrap()));
    assert_eq!(config.status_page.listen, Some("127.0.0.1:9465".parse().unwrap()));
    assert_eq!(config.cni.no_masquerade, ["198.51.100.0/24".parse().unwrap()]);
    let twice = error("[underlay]\naddresses = ['192.0.2.2', '::ffff:192.0.2.1']");
    assert!(twice.contains("second address of its family"), "{twice}");
    let multicast = error("[underlay]\naddresses = ['::ffff:224.0.0.1']");
    assert!(multicast.contains("unicast"), "{multicast}");
}

#[test]
fn unknown_key_is_error_with_its_name() {
    assert!(error("nmae = 'a'").contains("nmae"));
    assert!(error("[underlay]\nprot = 1").contains("prot"));
    assert!(error("[offload]\ntun_gso = true").contains("tun_gso"));
}

#[test]
fn invalid_value_is_error_with_remedy() {
    for (text, key, remedy) in [
        ("name = 'a b'", "name", "letters"),
        ("cluster_id = ''", "cluster_id", "1 to"),
        ("pod_cidrs = ['10.1.0.7/24']", "pod_cidrs", "10.1.0.0/24"),
        ("pod_cidrs = ['10.1.0.0']", "pod_cidrs", "10.1.0.0/24"),
        ("pod_cidrs = ['10.1.0.0/16', '10.1.2.0/24']", "pod_cidrs", "overlap"),
        ("pod_cidrs = ['0.0.0.0/0']", "pod_cidrs", "unicast"),
        ("pod_cidrs = ['::/0']", "pod_cidrs", "unicast"),
        ("pod_cidrs = ['168.0.0.0/7']", "pod_cidrs", "overlaps 169.254.0.0/16"),
        ("pod_cidrs = ['126.0.0.0/7']", "pod_cidrs", "overlaps 127.0.0.0/8"),
        ("pod_cidrs = ['192.0.0.0/2']", "pod_cidrs", "overlaps 224.0.0.0/4"),
        ("pod_cidrs = ['127.1.0.0/16']", "pod_cidrs", "overlaps 127.0.0.0/8"),
        ("pod_cidrs = ['fe00::/8']", "pod_cidrs", "overlaps fe80::/10"),
        ("cluster_cidrs = ['f000::/4']", "cluster_cidrs", "overlaps fe80::/10"),
        ("pod_cidrs = ['::/1']", "pod_cidrs", "overlaps ::/127"),
        ("pod_cidrs = ['::fffe:0:0/95']", "pod_cidrs", "overlaps ::ffff:0.0.0.0/96"),
        ("cluster_cidrs = ['10.1.0.7/24']", "cluster_cidrs", "10.1.0.0/24"),
        ("cluster_cidrs = ['10.1.0.0/16', '10.1.2.0/24']", "cluster_cidrs", "overlap"),
        (
            "pod_cidrs = ['10.1.0.0/24']\ncluster_cidrs = ['10.2.0.0/16']",
            "pod_cidrs",
            "outside of cluster_cidrs (10.2.0.0/16)",
        ),
        (
            "cluster_cidrs = ['192.0.2.0/24']\n[underlay]\naddresses = ['192.0.2.1']",
            "underlay.addresses",
            "192.0.2.1 lies in cluster_cidrs (192.0.2.0/24)",
        ),
        ("[interface]\nname = 'a-very-long-name'", "interface.name", "15"),
        ("[interface]\nname = 'a/b'", "interface.name", "15"),
        ("[interface]\nmtu = 100", "interface.mtu", "576"),
        ("pod_cidrs = ['fd00::/64']\n[interface]\nmtu = 1279", "interface.mtu", "1280"),
        ("[interface]\naddresses = ['x']", "interface.addresses", "IP address"),
        ("[interface]\ntxqueuelen = 0", "interface.txqueuelen", "1 to"),
        ("[underlay]\naddresses = []", "underlay.addresses", "remove the key"),
        ("[underlay]\naddresses = ['192.0.2.1', '192.0.2.2']", "underlay.addresses", "one"),
        ("[underlay]\naddresses = ['239.0.0.1']", "underlay.addresses", "unicast"),
        ("[underlay]\naddresses = ['fe80::1']", "underlay.addresses", "link-local"),
        ("[underlay]\nport = 0", "underlay.port", "1 to 65535"),
        ("[underlay]\nport = 70000", "port", "70000"),
        ("[underlay]\nreceive_buffer = 10", "underlay.receive_buffer", "65536"),
        ("[dataplane]\nlanes = 0", "dataplane.lanes", "1 to 64"),
        ("[dataplane]\nlanes = 65", "dataplane.lanes", "1 to 64"),
        ("[dataplane]\nbusy_poll_us = 1001", "dataplane.busy_poll_us", "0 to 1000"),
        ("[dataplane]\nmode = 'thread'", "mode", "spawn"),
        ("[dataplane]\ncipher = 'none'", "cipher", "aes256-gcm"),
        ("[dataplane]\nsocket = ''", "dataplane.socket", "path"),
        ("[dataplane]\nsocket = '/x'\n[control]\nsocket = '/x'", "control.socket", "its own"),
        (&format!("[control]\nsocket = '/{}'", "x".repeat(107)), "control.socket", "107"),
        ("[metrics]\nlisten = '9464'", "metrics.listen", "127.0.0.1:9464"),
        ("[metrics]\nhosts = ['a b']", "metrics.hosts", "host name"),
        ("[status_page]\nlisten = ':9465'", "status_page.listen", "127.0.0.1:9465"),
        ("[log]\nlevel = 'a=b=c'", "log.level", "info"),
    ] {
        let error = error(text);
        assert!(error.contains(key), "{text}: {error}");
        assert!(error.contains(remedy), "{text}: {error}");
    }
}

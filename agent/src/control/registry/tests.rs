#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::records::tests::{record, text};
use super::*;
use skein_ipc::keys::PublicKey;

struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("nodes")).unwrap();
        std::fs::create_dir(directory.path().join("state")).unwrap();
        Self { directory }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.directory.path().join("nodes").join(name), text).unwrap();
    }

    fn remove(&self, name: &str) {
        std::fs::remove_file(self.directory.path().join("nodes").join(name)).unwrap();
    }

    fn config(&self, more: &str) -> Config {
        let path = self.directory.path();
        let text = format!(
            "name = 'node-1'\n{more}\nnodes = {:?}\nstate_dir = {:?}",
            path.join("nodes"),
            path.join("state")
        );
        Config::parse(&text).unwrap()
    }

    fn open_with(&self, more: &str) -> Result<Registry, Failure> {
        let config = self.config(more);
        let source = RecordSource::Path(config.nodes.clone());
        Registry::open(&config, PublicKey([1; 32]).into(), source, Stored::read(&config))
            .inspect(Registry::write_store)
    }

    /// Opens the registry of a node whose key bytes are `key`.
    fn open_as(&self, key: u8) -> Result<Registry, Failure> {
        let config = self.config("");
        let source = RecordSource::Path(config.nodes.clone());
        Registry::open(&config, PublicKey([key; 32]).into(), source, Stored::read(&config))
            .inspect(Registry::write_store)
    }

    fn open(&self) -> Result<Registry, Failure> {
        self.open_with("pod_cidrs = ['10.1.0.0/24']")
    }
}

fn peers(registry: &Registry) -> Vec<String> {
    registry.peers().map(|record| format!("{} {}", record.name, record.pod_cidrs[0])).collect()
}

#[test]
fn own_record_sets_the_pod_cidrs() {
    let lab = Lab::new();
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    let registry = lab.open_with("").unwrap();
    assert_eq!(registry.local_cidrs(), ["10.1.0.0/24".parse().unwrap()]);
    assert_eq!(peers(&registry), ["node-2 10.2.0.0/24"]);
    assert_eq!(registry.own(), Some(&record(1, &["10.1.0.0/24"])));
    lab.remove("a.toml");
    assert!(lab.open_with("").is_err(), "no pod CIDRs");
}

#[test]
fn invalid_file_ends_the_first_start_only() {
    let lab = Lab::new();
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    lab.write("b.toml", "node = [");
    assert!(lab.open_with("").is_err());
    lab.remove("b.toml");
    lab.open_with("").unwrap();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    lab.write("c.toml", "node = [");
    let registry = lab.open_with("").unwrap();
    assert_eq!(peers(&registry), ["node-2 10.2.0.0/24"]);
    assert_eq!(registry.status().rejected.len(), 1);
    assert!(registry.status().rejected[0].origin.ends_with("c.toml"));
}

#[test]
fn prefixes_of_node_without_record_stay_its_own() {
    let lab = Lab::new();
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    let mut registry = lab.open_with("").unwrap();
    // A renamed record is a peer with this node's key and prefixes. The last good version stays
    // active.
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]).replace("node-1", "node-one"));
    registry.reload();
    assert_eq!(peers(&registry), ["node-2 10.2.0.0/24"]);
    assert_eq!(registry.status().rejected.len(), 1);
    // The record is removed and another node claims the prefix. Other changes take effect.
    lab.remove("a.toml");
    lab.write("c.toml", &text(3, &["10.1.0.0/25"]));
    lab.remove("b.toml");
    registry.reload();
    assert_eq!(peers(&registry), Vec::<String>::new());
    assert_eq!(registry.local_cidrs(), ["10.1.0.0/24".parse().unwrap()]);
    assert!(registry.status().rejected[0].error.contains("overlap"));
}

#[test]
fn first_start_with_invalid_records_fails() {
    for (file, expected) in [
        (text(1, &["10.1.0.0/25"]), "configuration differ"),
        (text(2, &["10.1.0.0/25"]), "overlap"),
        (text(1, &["10.1.0.0/24"]).replace("node-1", "twin"), "same key"),
        ("nmae = 1".to_owned(), "nmae"),
    ] {
        let lab = Lab::new();
        lab.write("x.toml", &file);
        let error = lab.open().unwrap_err();
        assert!(matches!(error, Failure::Usage(_)), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
        assert!(error.to_string().contains("x.toml"), "{error}");
    }
    let lab = Lab::new();
    lab.write("x.toml", &text(1, &["10.1.0.0/24"]));
    let error = lab.open_as(9).unwrap_err().to_string();
    assert!(error.contains("public_key") && error.contains("Correct the record"), "{error}");
}

#[test]
fn invalid_file_keeps_last_good_version_over_restart() {
    let lab = Lab::new();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    lab.write("c.toml", &text(3, &["10.3.0.0/24"]));
    let mut registry = lab.open().unwrap();
    let before = peers(&registry);
    lab.write("b.toml", "name = ");
    assert!(!registry.reload());
    assert_eq!(peers(&registry), before);
    assert_eq!(registry.status().rejected.len(), 1);
    let registry = lab.open().unwrap();
    assert_eq!(peers(&registry), before);
    assert_eq!(registry.status().rejected.len(), 1);
}

#[test]
fn restart_refuses_the_same_records_as_reload() {
    for (new, expected) in [
        ("name = ".to_owned(), "line 1"),
        (text(4, &["10.2.0.0/25"]), "overlap"),
        (text(4, &["10.1.0.0/25"]), "the other is this node"),
    ] {
        let lab = Lab::new();
        lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
        lab.write("c.toml", &text(3, &["10.3.0.0/24"]));
        lab.open().unwrap();
        // While the agent is stopped, one file becomes invalid, another changes, and a third is
        // removed.
        lab.write("a.toml", &new);
        lab.write("d.toml", &text(5, &["10.5.0.0/24"]));
        lab.remove("c.toml");
        for _ in 0..2 {
            let mut registry = lab.open().unwrap();
            assert_eq!(peers(&registry), ["node-2 10.2.0.0/24", "node-5 10.5.0.0/24"]);
            let rejected = registry.status().rejected;
            assert_eq!(rejected.len(), 1, "{rejected:?}");
            assert!(rejected[0].origin.ends_with("a.toml"), "{rejected:?}");
            assert!(rejected[0].error.contains(expected), "{rejected:?}");
            assert!(!registry.reload());
            assert_eq!(registry.status().rejected, rejected);
        }
        lab.write("a.toml", &text(4, &["10.4.0.0/24"]));
        assert_eq!(lab.open().unwrap().peers().count(), 3, "the corrected file is accepted");
    }
}

#[test]
fn error_of_missing_pod_cidrs_names_invalid_own_record() {
    let lab = Lab::new();
    lab.open().unwrap();
    lab.write("a.toml", "name = 'node-1'");
    let error = lab.open_with("").unwrap_err().to_string();
    assert!(error.contains("a.toml") && error.contains("has no pod CIDRs"), "{error}");
}

#[test]
fn changes_and_removals_take_effect() {
    let lab = Lab::new();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    let mut registry = lab.open().unwrap();
    assert!(!registry.reload(), "nothing has changed");
    lab.write("b.toml", &text(2, &["10.9.0.0/24"]));
    lab.write("c.toml", &text(3, &["10.3.0.0/24"]));
    assert!(registry.reload());
    assert_eq!(peers(&registry), ["node-2 10.9.0.0/24", "node-3 10.3.0.0/24"]);
    lab.remove("b.toml");
    assert!(registry.reload());
    assert_eq!(peers(&registry), ["node-3 10.3.0.0/24"]);
}

#[test]
fn changed_file_loses_against_unchanged_one() {
    let lab = Lab::new();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    lab.write("c.toml", &text(3, &["10.3.0.0/24"]));
    let mut registry = lab.open().unwrap();
    let before = peers(&registry);
    lab.write("b.toml", &text(2, &["10.3.0.0/25"]));
    lab.write("a.toml", &text(4, &["10.3.0.128/25"]));
    assert!(!registry.reload());
    assert_eq!(peers(&registry), before);
    let rejected = registry.status().rejected;
    assert_eq!(rejected.len(), 2);
    assert!(rejected.iter().all(|file| file.error.contains("c.toml")), "{rejected:?}");
    lab.write("b.toml", &text(2, &["10.1.0.128/25"]));
    lab.remove("a.toml");
    assert!(!registry.reload());
    assert!(registry.status().rejected[0].error.contains("the other is this node"));
}

/// A hostile node claims the next key of another node after its announcement.
#[test]
fn announced_key_stays_with_its_node() {
    let lab = Lab::new();
    let (mine, old, next) = (PublicKey([2; 32]), PublicKey([3; 32]), PublicKey([9; 32]));
    let text = |n: u8, public_key, second_public_key| {
        let record = record(n, &[&format!("10.{n}.0.0/24")]);
        toml::to_string(&NodeRecord { public_key, second_public_key, ..record }).unwrap()
    };
    lab.write("b.toml", &text(2, mine, None));
    lab.write("c.toml", &text(3, old, Some(next)));
    let mut registry = lab.open().unwrap();
    for claim in [text(2, next, None), text(2, mine, Some(next))] {
        lab.write("b.toml", &claim);
        for record in [text(3, old, Some(next)), text(3, next, Some(old)), text(3, old, Some(next))]
        {
            lab.write("c.toml", &record);
            registry.reload();
            let node = registry.peers().find(|node| node.name == "node-3").unwrap();
            assert_eq!(toml::to_string(node).unwrap(), record);
            let rejected = registry.status().rejected;
            assert_eq!(rejected.len(), 1, "{rejected:?}");
            assert!(rejected[0].error.contains("same key"), "{rejected:?}");
        }
    }
}

#[test]
fn records_outside_cluster_cidrs_are_refused() {
    let lab = Lab::new();
    let cluster = "cluster_cidrs = ['10.0.0.0/14', 'fd00::/16']";
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    lab.write("b.toml", &text(2, &["10.2.0.0/24", "fd00:2::/64"]));
    let mut registry = lab.open_with(cluster).unwrap();
    lab.write("c.toml", &text(3, &["10.3.0.0/24", "192.0.2.64/26"]));
    lab.write("d.toml", &text(4, &["64.0.0.0/3"]));
    assert!(!registry.reload());
    let rejected = registry.status().rejected;
    assert_eq!(rejected.len(), 2, "{rejected:?}");
    for (refused, outside) in rejected.iter().zip(["192.0.2.64/26", "64.0.0.0/3"]) {
        let said = format!("{outside} is outside of cluster_cidrs (10.0.0.0/14, fd00::/16)");
        assert!(refused.error.contains(&said), "{refused:?}");
    }
    lab.remove("c.toml");
    lab.remove("d.toml");
    let error = lab.open_with("cluster_cidrs = ['10.2.0.0/16']").unwrap_err().to_string();
    assert!(error.contains("node-1: pod_cidrs: 10.1.0.0/24 is outside"), "{error}");
    let registry = lab.open_with("cluster_cidrs = ['10.1.0.0/16']").unwrap();
    assert_eq!(
        peers(&registry),
        Vec::<String>::new(),
        "last good records outside the new cluster_cidrs are refused"
    );
}

#[test]
fn prefix_moves_between_files_that_change_together() {
    let lab = Lab::new();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    lab.write("c.toml", &text(3, &["10.3.0.0/24"]));
    let mut registry = lab.open().unwrap();
    lab.write("b.toml", &text(2, &["10.3.0.0/24"]));
    lab.write("c.toml", &text(3, &["10.2.0.0/24"]));
    assert!(registry.reload());
    assert_eq!(peers(&registry), ["node-2 10.3.0.0/24", "node-3 10.2.0.0/24"]);
    assert_eq!(registry.status().rejected, []);
}

#[test]
fn start_without_source_uses_last_good_records() {
    let lab = Lab::new();
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    let before = peers(&lab.open().unwrap());
    let nodes = lab.directory.path().join("nodes");
    std::fs::rename(&nodes, lab.directory.path().join("away")).unwrap();
    let mut registry = lab.open().unwrap();
    assert_eq!(peers(&registry), before);
    assert!(registry.status().source_error.is_some());
    assert!(!registry.reload());
    assert_eq!(peers(&registry), before);
    std::fs::remove_file(lab.directory.path().join("state/registry.json")).unwrap();
    let error = lab.open().unwrap_err().to_string();
    assert!(error.contains("Create the directory"), "{error}");
}

/// Earlier releases kept endpoints that this release refuses.
#[test]
fn refused_kept_endpoints_leave_the_other_records() {
    let lab = Lab::new();
    for n in 2..=6 {
        lab.write(&format!("{n}.toml"), &text(n, &[&format!("10.{n}.0.0/24")]));
    }
    let mut registry = lab.open().unwrap();
    lab.remove("6.toml");
    registry.reload();
    let store = lab.directory.path().join("state/registry.json");
    let kept = std::fs::read_to_string(&store).unwrap();
    let old = kept
        .replace("\"192.0.2.2:51900\"", "\"[fe80::1]:51900\",\"192.0.2.2:51900\"")
        .replace("\"192.0.2.3:51900\"", "\"255.255.255.255:51900\"")
        .replace("\"192.0.2.4:51900\"", "\"[::ffff:224.0.0.1]:51900\",\"[fe80::1]:51900\"");
    assert_eq!(old.matches("fe80::1").count(), 2, "{kept}");
    std::fs::write(&store, old).unwrap();
    let config = lab.config("pod_cidrs = ['10.1.0.0/24']");
    let kept = Stored::read(&config).unwrap().unreachable_prefixes(&config).unwrap();
    let expected: BTreeSet<IpNet> =
        (1..=6).map(|n| format!("10.{n}.0.0/24").parse().unwrap()).collect();
    assert_eq!(kept, expected, "Prefixes of refused records stay unreachable.");
    let nodes = lab.directory.path().join("nodes");
    std::fs::rename(nodes, lab.directory.path().join("away")).unwrap();
    let registry = lab.open().unwrap();
    let found: Vec<_> = registry.peers().map(|record| record.name.as_str()).collect();
    assert_eq!(found, ["node-2", "node-5"], "The other records stay in use.");
    let former: BTreeSet<IpNet> = registry.former.iter().copied().collect();
    let expected = [3, 4, 6].map(|n| format!("10.{n}.0.0/24").parse().unwrap());
    assert_eq!(former, BTreeSet::from(expected), "The former prefixes stay.");
}

#[test]
fn endpoint_of_a_peer_opens_no_former_prefix() {
    let lab = Lab::new();
    let with_endpoint = |n: u8, ip: &str| {
        text(n, &[&format!("10.{n}.0.0/24")])
            .replace("endpoints = [", &format!("endpoints = ['{ip}', "))
    };
    for n in 1..=4 {
        lab.write(&format!("{n}.toml"), &text(n, &[&format!("10.{n}.0.0/24")]));
    }
    let mut registry = lab.open_with("").unwrap();
    lab.remove("2.toml");
    lab.remove("4.toml");
    lab.write("1.toml", &with_endpoint(1, "10.4.0.77"));
    lab.write("3.toml", &with_endpoint(3, "10.2.0.77"));
    assert!(registry.reload());
    assert_eq!(registry.status().rejected, []);
    let expected: BTreeSet<IpNet> =
        [1, 2, 3].map(|n| format!("10.{n}.0.0/24").parse().unwrap()).into();
    let config = lab.config("");
    let prefixes = registry.overlay_prefixes(&config);
    assert_eq!(prefixes, expected, "Only this node's own address exempts a former prefix.");
    let kept = Stored::read(&config).unwrap().unreachable_prefixes(&config).unwrap();
    assert_eq!(kept, expected, "The same holds before the records are read.");
}

#[test]
fn removed_own_record_keeps_the_pod_cidrs() {
    let lab = Lab::new();
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    let mut registry = lab.open_with("").unwrap();
    lab.remove("a.toml");
    assert!(registry.reload());
    assert_eq!(registry.local_cidrs(), ["10.1.0.0/24".parse().unwrap()]);
}

/// A writer that counts the bytes of the log.
struct CountingWriter(Arc<AtomicUsize>);

impl std::io::Write for CountingWriter {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn edits_of_1_mb_give_a_bounded_log() {
    let lab = Lab::new();
    lab.write("a.toml", &text(1, &["10.1.0.0/24"]));
    lab.write("b.toml", &text(2, &["10.2.0.0/24"]));
    let mut registry = lab.open().unwrap();
    let (good, huge) = (text(2, &["10.2.0.0/24"]), "x".repeat(1 << 20));
    let key = record(2, &[]).public_key.to_string();
    let many = format!("{}\"192.0.2.2:51900\"", "\"no address\", ".repeat(100_000));
    let edits = [
        good.replace("node-2", &huge),
        good.replace(&key, &huge),
        good.replace("192.0.2.2:51900", &huge),
        good.replace("\"192.0.2.2:51900\"", &many),
        good.replace("10.2.0.0/24", &huge),
        format!("{good}{huge} = 1"),
        format!("{good}{huge}"),
        format!("{good}second_public_key = ['{huge}']"),
    ];
    let logged = Arc::new(AtomicUsize::new(0));
    let writer = Arc::clone(&logged);
    let subscriber =
        tracing_subscriber::fmt().with_writer(move || CountingWriter(Arc::clone(&writer)));
    tracing::subscriber::with_default(subscriber.finish(), || {
        for edit in edits {
            lab.write("b.toml", &edit);
            registry.reload();
            let bytes = logged.swap(0, Ordering::Relaxed);
            assert!((1..4_000).contains(&bytes), "{bytes} bytes of log: {edit:.300}");
            let errors = registry.status().rejected;
            assert!(errors.iter().all(|refused| refused.error.len() < 2_000), "{edit:.300}");
        }
    });
}

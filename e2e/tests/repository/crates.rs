//! The order in which the crates import each other (docs/architecture.md), and crates that must stay
//! out of some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use skein_lab::cargo::{command, workspace};

/// Each crate of the workspace, and the crates of the workspace that it may import, in its tests,
/// too.
const IMPORTS: [(&str, &[&str]); 16] = [
    ("skein-core", &[]),
    ("skein-cni-protocol", &[]),
    ("skein-sys", &["skein-core"]),
    ("skein-ipc", &["skein-core"]),
    ("skein-dataplane", &["skein-core", "skein-ipc", "skein-sys"]),
    ("skein-netlink", &["skein-core", "skein-sys"]),
    ("skein-ipam", &["skein-cni-protocol"]),
    ("skein-policy", &["skein-core", "skein-netlink", "skein-sys"]),
    (
        "skein-agent",
        &[
            "skein-cni-protocol",
            "skein-core",
            "skein-dataplane",
            "skein-ipam",
            "skein-ipc",
            "skein-netlink",
            "skein-sys",
        ],
    ),
    ("skein-cni", &["skein-cni-protocol"]),
    ("skein-lab", &[]),
    ("skein-language", &[]),
    ("skein-preload", &[]),
    ("skein-bench", &["skein-lab"]),
    ("skein-cluster", &["skein-lab"]),
    ("skein-e2e", &["skein-bench", "skein-cluster", "skein-core", "skein-lab"]),
];

/// Crates that must not be linked, directly or by another crate.
const ABSENT: [(&str, &[&str]); 6] = [
    ("skein-core", &["rustix", "socket2", "tokio"]),
    ("skein-ipc", &["tokio"]),
    ("skein-dataplane", &["axum", "clap", "kube", "redb", "tokio"]),
    ("skein-ipam", &["kube", "tokio"]),
    ("skein-policy", &["k8s-openapi", "kube"]),
    ("skein-cni", &["kube", "tokio"]),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    id: String,
    targets: Vec<Target>,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    src_path: String,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDependency>,
}

#[derive(Deserialize)]
struct NodeDependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

impl Metadata {
    fn read(features: &[&str]) -> Result<Self> {
        // Packages of other platforms are not downloaded.
        let platform = format!("--filter-platform={}-unknown-linux-gnu", std::env::consts::ARCH);
        let metadata = ["metadata", "--format-version=1", "--locked", &platform];
        let output = command(&[&metadata, features].concat()).output()?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cargo metadata: {complaint}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    fn members(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| self.workspace_members.contains(&package.id))
    }

    fn package(&self, name: &str) -> Result<&Package> {
        self.members().find(|package| package.name == name).context("no such crate")
    }

    /// Returns the names of all crates that `package` links, without those of its tests.
    fn linked(&self, package: &Package) -> BTreeSet<&str> {
        let nodes: BTreeMap<_, _> =
            self.resolve.nodes.iter().map(|node| (&node.id, node)).collect();
        let (mut found, mut open) = (BTreeSet::from([&package.id]), vec![&package.id]);
        while let Some(id) = open.pop() {
            for dependency in nodes.get(id).iter().flat_map(|node| &node.deps) {
                let linked =
                    dependency.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"));
                if linked && found.insert(&dependency.pkg) {
                    open.push(&dependency.pkg);
                }
            }
        }
        let packages = self.packages.iter().filter(|package| found.contains(&package.id));
        packages.map(|package| package.name.as_str()).collect()
    }
}

#[test]
fn crates_import_downwards_only() -> Result<()> {
    let metadata = Metadata::read(&[])?;
    let names: BTreeSet<_> = metadata.members().map(|package| package.name.as_str()).collect();
    let ordered = IMPORTS.iter().map(|(name, _)| *name).collect();
    ensure!(names == ordered, "IMPORTS lacks a crate, or has one too many: {names:?}");
    for (name, allowed) in IMPORTS {
        for dependency in &metadata.package(name)?.dependencies {
            let import = dependency.name.as_str();
            let outside = !names.contains(import);
            ensure!(outside || allowed.contains(&import), "{name} must not import {import}");
        }
    }
    Ok(())
}

#[test]
fn crates_link_nothing_that_must_stay_out() -> Result<()> {
    let metadata = Metadata::read(&[])?;
    for (name, absent) in ABSENT {
        let linked = metadata.linked(metadata.package(name)?);
        for other in absent {
            ensure!(!linked.contains(other), "{name} must not link {other}");
        }
    }
    let agent = metadata.linked(metadata.package("skein-agent")?);
    ensure!(agent.contains("kube") && agent.contains("tokio"), "Dependencies are no longer found.");
    Ok(())
}

/// Bound of the crates that `cargo e2e demo` builds in a fresh clone. It was 200 when it was set.
const MAX_DEMO_CRATES: usize = 210;

#[test]
fn demo_builds_few_crates_and_no_kubernetes() -> Result<()> {
    let metadata = Metadata::read(&["--no-default-features"])?;
    let mut built = BTreeSet::new();
    for name in ["skein-agent", "skein-cni", "skein-e2e"] {
        built.extend(metadata.linked(metadata.package(name)?));
    }
    ensure!(!built.contains("kube") && !built.contains("k8s-openapi"), "The demo builds kube.");
    ensure!(built.len() <= MAX_DEMO_CRATES, "The demo builds {} crates.", built.len());
    Ok(())
}

#[test]
fn only_skein_sys_has_unsafe_code() -> Result<()> {
    for package in Metadata::read(&[])?.members() {
        let libraries = package.targets.iter().filter(|target| target.kind == ["lib"]);
        for library in libraries.filter(|_| !["skein-sys", "skein-lab"].contains(&&*package.name)) {
            let source = fs::read_to_string(&library.src_path)?;
            let forbids = source.lines().any(|line| line == "#![forbid(unsafe_code)]");
            ensure!(forbids, "{} lacks #![forbid(unsafe_code)]", library.src_path);
        }
    }
    Ok(())
}

#[test]
fn no_crate_republishes_all_of_another() -> Result<()> {
    let mut read = 0;
    for directory in ["agent", "cni-plugin"] {
        let mut open = vec![workspace().join(directory)];
        while let Some(path) = open.pop() {
            if path.is_dir() {
                for entry in fs::read_dir(&path)? {
                    open.push(entry?.path());
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = fs::read_to_string(&path)?;
                let republishes = |line: &str| {
                    line.trim_start().starts_with("pub use skein_") && line.ends_with("::*;")
                };
                ensure!(!source.lines().any(republishes), "{}: pub use of a crate", path.display());
                read += 1;
            }
        }
    }
    ensure!(read > 100, "only {read} files: is this test still reading them?");
    Ok(())
}

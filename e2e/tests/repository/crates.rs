//! The order in which crates and their modules import each other (docs/architecture.md),
//! and crates that must stay out of some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use skein_lab::cargo::{command, workspace};

use crate::lists;

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
            "skein-policy",
            "skein-sys",
        ],
    ),
    ("skein-cni", &["skein-cni-protocol"]),
    ("skein-lab", &[]),
    ("skein-language", &[]),
    ("skein-preload", &[]),
    ("skein-bench", &["skein-lab"]),
    ("skein-cluster", &["skein-lab"]),
    // The agent and the plugin are in one build with the tests, which start the programs.
    (
        "skein-e2e",
        &["skein-agent", "skein-bench", "skein-cluster", "skein-cni", "skein-core", "skein-lab"],
    ),
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
    manifest_path: PathBuf,
    targets: Vec<Target>,
    dependencies: Vec<Dependency>,
    features: BTreeMap<String, Vec<String>>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
    src_path: String,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    features: Vec<String>,
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
            ensure!(outside || allowed.contains(&import), "{name} must not import {import}.");
        }
    }
    Ok(())
}

/// The table lists each crate with its directory, the drawing each import: solid, or dashed if only
/// tests import the crate.
#[test]
fn crates_and_their_imports_are_documented() -> Result<()> {
    let (path, metadata) = ("docs/architecture.md", Metadata::read(&[])?);
    let root = workspace().canonicalize()?;
    let rows = lists::rows(path, "Crates", "crate | directory | contents")?;
    let documented: BTreeSet<_> =
        rows.into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    let crates = metadata.members().map(|package| {
        let directory = package.manifest_path.parent().context("no directory")?;
        let directory = directory.strip_prefix(&root)?.display();
        Ok((package.name.clone(), format!("`{directory}`")))
    });
    assert_eq!(documented, crates.collect::<Result<BTreeSet<_>>>()?);

    let names: BTreeSet<_> = metadata.members().map(|package| package.name.as_str()).collect();
    let mut imports = BTreeSet::new();
    for package in metadata.members() {
        let inside = package.dependencies.iter().filter(|import| names.contains(&*import.name));
        let (tests, linked): (Vec<_>, Vec<_>) =
            inside.partition(|import| import.kind.as_deref() == Some("dev"));
        let linked: BTreeSet<_> = linked.iter().map(|import| import.name.as_str()).collect();
        let tests = tests.iter().map(|import| import.name.as_str());
        let tests = tests.filter(|name| !linked.contains(name)).map(|name| ("-.->", name));
        let all = linked.iter().map(|name| ("-->", *name)).chain(tests);
        imports.extend(all.map(|(arrow, to)| format!("{} {arrow} {to}", package.name)));
    }
    let text = fs::read_to_string(workspace().join(path))?;
    let drawing = text.split("```mermaid").find(|part| part.contains("skein-agent]"));
    let drawing = drawing.and_then(|part| part.split("```").next()).context("no drawing")?;
    // A name of the drawing has its crate in brackets where it occurs first: agent[skein-agent].
    let mut crates = BTreeMap::new();
    let mut drawn = BTreeSet::new();
    for line in drawing.lines() {
        let [from, arrow @ ("-->" | "-.->"), to] = line.split_whitespace().collect::<Vec<_>>()[..]
        else {
            continue;
        };
        let ends = [from, to].map(|end| match end.split_once('[') {
            Some((name, rest)) => {
                crates.insert(name.to_owned(), rest.trim_end_matches(']').to_owned());
                name.to_owned()
            }
            None => end.to_owned(),
        });
        let [from, to] = ends.map(|name| crates.get(&name).cloned().unwrap_or(name));
        drawn.insert(format!("{from} {arrow} {to}"));
    }
    assert_eq!(drawn, imports);
    Ok(())
}

/// Functions for fuzzing are in crates only with the feature `fuzzing` and in unit tests, and no
/// crate of the workspace enables the feature of another one by itself.
#[test]
fn fuzzing_entry_points_need_their_feature() -> Result<()> {
    const GATE: &str = "#[cfg(any(test, feature = \"fuzzing\"))]";
    let mut found = 0;
    for path in rust_files(&workspace().join("agent"))? {
        let source = fs::read_to_string(&path)?;
        let lines: Vec<_> = source.lines().map(str::trim_start).collect();
        for (index, line) in lines.iter().enumerate() {
            let words: Vec<_> = line.split([' ', '(', ';']).collect();
            let at = words.iter().position(|word| ["fn", "mod"].contains(word));
            let name = at.and_then(|at| words.get(at + 1)).copied().unwrap_or_default();
            if ["fuzzing", "fuzz_access"].contains(&name) || name.starts_with("fuzz_") {
                let above = lines[..index].iter().rev();
                let mut above = above.take_while(|line| line.starts_with(['#', '/']));
                let is_test = words.first() == Some(&"fn");
                ensure!(
                    is_test || above.any(|line| *line == GATE),
                    "{}: {name} needs {GATE}.",
                    path.display()
                );
                found += usize::from(!is_test);
            }
        }
    }
    ensure!(found > 10, "Only {found} entry points are found.");
    for package in Metadata::read(&[])?.members() {
        let enabled = |import: &&Dependency| import.features.iter().any(|name| name == "fuzzing");
        let import = package.dependencies.iter().find(enabled).map(|import| &import.name);
        ensure!(import.is_none(), "{} enables fuzzing of {import:?}.", package.name);
        let default = package.features.get("default").map(Vec::as_slice).unwrap_or_default();
        ensure!(!default.iter().any(|name| name.contains("fuzzing")), "{}: fuzzing", package.name);
    }
    Ok(())
}

#[test]
fn crates_link_nothing_that_must_stay_out() -> Result<()> {
    let metadata = Metadata::read(&[])?;
    for (name, absent) in ABSENT {
        let linked = metadata.linked(metadata.package(name)?);
        for other in absent {
            ensure!(!linked.contains(other), "{name} must not link {other}.");
        }
    }
    let agent = metadata.linked(metadata.package("skein-agent")?);
    ensure!(agent.contains("kube") && agent.contains("tokio"), "Dependencies are no longer found.");
    Ok(())
}

/// Bound of the crates that `cargo e2e demo` builds in a fresh clone. It was 197 when it was set.
const MAX_DEMO_CRATES: usize = 207;

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
            ensure!(forbids, "{} lacks #![forbid(unsafe_code)].", library.src_path);
        }
    }
    Ok(())
}

#[test]
fn no_crate_republishes_all_of_another() -> Result<()> {
    let files =
        [rust_files(&workspace().join("agent"))?, rust_files(&workspace().join("cni-plugin"))?];
    let files = files.concat();
    for path in &files {
        let source = fs::read_to_string(path)?;
        let republishes =
            |line: &str| line.trim_start().starts_with("pub use skein_") && line.ends_with("::*;");
        ensure!(!source.lines().any(republishes), "{} republishes a crate.", path.display());
    }
    ensure!(files.len() > 100, "Only {} files were read.", files.len());
    Ok(())
}

/// Returns the Rust files below `directory`.
fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, mut open) = (Vec::new(), vec![directory.to_path_buf()]);
    while let Some(path) = open.pop() {
        if path.is_dir() {
            for entry in fs::read_dir(&path)? {
                open.push(entry?.path());
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// Paths to modules of the same crate that `source` names after `crate::` or `super::`, as segments
/// from the crate's root. `module` is the module of the source.
fn imports(source: &str, module: &[String]) -> Vec<Vec<String>> {
    let code = source.lines().map(|line| line.split("//").next().unwrap_or(""));
    let code = code.collect::<Vec<_>>().join("\n");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::").chain(code.match_indices("super::")) {
        let before = code[..at].chars().next_back();
        // The rest of a path that begins earlier, or the end of another word.
        if before.is_some_and(|c| c.is_alphanumeric() || "_:".contains(c)) {
            continue;
        }
        let (mut base, mut rest) = (module.to_vec(), &code[at..]);
        while let Some(after) = rest.strip_prefix("super::") {
            base.pop();
            rest = after;
        }
        if let Some(after) = rest.strip_prefix("crate::") {
            (base, rest) = (Vec::new(), after);
        }
        expand(base, rest, &mut found);
    }
    found
}

/// Adds the paths of the tree at the start of `rest`, each after `base`. Returns the text after the
/// tree.
fn expand<'a>(base: Vec<String>, rest: &'a str, found: &mut Vec<Vec<String>>) -> &'a str {
    let rest = rest.trim_start();
    if let Some(mut rest) = rest.strip_prefix('{') {
        while !rest.trim_start().starts_with('}') && !rest.trim_start().is_empty() {
            rest = expand(base.clone(), rest, found).trim_start();
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        return rest.trim_start().strip_prefix('}').unwrap_or("");
    }
    let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    let path = [base, vec![word.to_owned()]].concat();
    match after.strip_prefix("::") {
        Some(after) => expand(path, after, found),
        None => {
            found.push(path);
            // Skips the new name of `a as b`.
            after.find([',', '}', ';']).map_or("", |next| &after[next..])
        }
    }
}

/// Returns the modules of the crate in `directory` with their sources, without unit tests. The path
/// of a module begins at the crate's root.
fn modules(directory: &str) -> Result<Vec<(Vec<String>, String)>> {
    let root = workspace().join(directory);
    let mut modules = Vec::new();
    for path in rust_files(&root)? {
        let name = path.strip_prefix(&root)?.with_extension("");
        let mut module: Vec<_> =
            name.iter().map(|segment| segment.to_string_lossy().into_owned()).collect();
        module.pop_if(|last| ["lib", "mod"].contains(&last.as_str()));
        if !module.iter().any(|name| ["tests", "testing"].contains(&name.as_str())) {
            let source = fs::read_to_string(&path)?;
            let code = source.split("\nmod tests {").next().unwrap_or_default();
            modules.push((module, code.to_owned()));
        }
    }
    Ok(modules)
}

#[test]
fn imports_of_nested_use_trees_are_resolved() {
    let module = ["control", "kubernetes", "follow"].map(str::to_owned);
    let source = "use super::{client::{self as c, X}, own}; // crate::no\n\
                  use super::super::records::Files; fn f() { crate::cni::remove(1) }";
    let found: Vec<_> = imports(source, &module).iter().map(|path| path.join("::")).collect();
    let expected = [
        "cni::remove",
        "control::kubernetes::client::self",
        "control::kubernetes::client::X",
        "control::kubernetes::own",
        "control::records::Files",
    ];
    assert_eq!(found, expected);
}

/// Modules of one directory, with everything below each of them, must not import each other in
/// circles. A child may import its parent.
#[test]
fn modules_of_a_crate_import_each_other_without_circles() -> Result<()> {
    let mut edges = 0;
    for directory in ["agent/src", "agent/dataplane/src", "agent/netlink/src", "agent/ipam/src"] {
        let modules = modules(directory)?;
        ensure!(modules.len() > 10, "Only {} modules are found in {directory}.", modules.len());
        edges += check_circles(&modules).with_context(|| directory.to_owned())?;
    }
    ensure!(edges > 200, "Only {edges} imports are found.");
    Ok(())
}

/// Checks that no directory of modules has a circle of imports. Returns the number of imports.
///
/// # Errors
/// An error that names the modules of a circle.
fn check_circles(modules: &[(Vec<String>, String)]) -> Result<usize> {
    let known: BTreeSet<_> = modules.iter().map(|(module, _)| module.as_slice()).collect();
    // By directory: each module, and the modules beside it that it imports.
    let mut graphs: BTreeMap<Vec<String>, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
    for (module, source) in modules {
        for path in imports(source, module) {
            let mut prefixes = (0..=path.len()).rev().map(|end| &path[..end]);
            let Some(target) = prefixes.find(|prefix| known.contains(prefix)) else { continue };
            let common = module.iter().zip(target).take_while(|(a, b)| a == b).count();
            if let (Some(from), Some(to)) = (module.get(common), target.get(common)) {
                let graph = graphs.entry(module[..common].to_vec()).or_default();
                graph.entry(from.clone()).or_default().insert(to.clone());
            }
        }
    }
    let edges = graphs.values().flat_map(BTreeMap::values).map(BTreeSet::len).sum();
    for (directory, graph) in &mut graphs {
        while let Some(end) = graph.iter().find_map(|(from, imports)| {
            imports.iter().all(|to| !graph.contains_key(to)).then(|| from.clone())
        }) {
            graph.remove(&end);
        }
        ensure!(
            graph.is_empty(),
            "The modules of {} import each other: {graph:?}",
            directory.join("::")
        );
    }
    Ok(edges)
}

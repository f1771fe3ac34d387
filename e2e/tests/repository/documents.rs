//! Links, test names and comparisons of secrets in documents and sources.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use skein_lab::cargo::workspace;

fn documents() -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for directory in [workspace(), workspace().join("docs"), workspace().join("charts/skein")] {
        for entry in fs::read_dir(directory)? {
            all.push(entry?.path());
        }
    }
    all.retain(|path| path.extension().is_some_and(|extension| extension == "md"));
    Ok(all)
}

/// Returns the targets of the Markdown links that are not in code.
fn targets(text: &str) -> Vec<&str> {
    // Text and code alternate at fences, and within text at single backquotes.
    let prose = text.split("```").step_by(2).flat_map(|part| part.split('`').step_by(2));
    let links = prose.flat_map(|part| part.split("](").skip(1));
    links.filter_map(|rest| rest.split(')').next()).collect()
}

/// Returns the anchors of the headings, as GitHub forms them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.split("```").step_by(2).flat_map(str::lines);
    let headings = headings.filter(|line| line.starts_with('#'));
    let kept = |c: &char| c.is_alphanumeric() || [' ', '-', '_'].contains(c);
    let anchor = |line: &str| {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        title.chars().filter(kept).collect::<String>().replace(' ', "-")
    };
    headings.map(anchor).collect()
}

/// Checks one link, and returns whether its target is in this repository.
fn check(document: &Path, text: &str, target: &str) -> Result<bool> {
    if ["https:", "http:", "mailto:"].iter().any(|scheme| target.starts_with(scheme)) {
        return Ok(false);
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let file = match path {
        "" => document.to_owned(),
        path => document.parent().context("no directory")?.join(path),
    };
    ensure!(file.exists(), "The file {} does not exist.", file.display());
    if !anchor.is_empty() {
        let linked = if path.is_empty() { text.to_owned() } else { fs::read_to_string(&file)? };
        ensure!(anchors(&linked).contains(anchor), "The heading {anchor} does not exist.");
    }
    Ok(true)
}

#[test]
fn relative_links_have_targets() -> Result<()> {
    let mut checked = 0;
    for document in documents()? {
        let text = fs::read_to_string(&document)?;
        for target in targets(&text) {
            let found = check(&document, &text, target);
            checked += usize::from(
                found.with_context(|| format!("{}: link to {target}", document.display()))?,
            );
        }
    }
    ensure!(checked > 5, "Only {checked} links were found.");
    Ok(())
}

/// Returns the texts between single backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Each row of the table lists files, and after each file the tests in it.
#[test]
fn every_promise_has_existing_tests() -> Result<()> {
    let text = fs::read_to_string(workspace().join("docs/security.md"))?;
    let (_, section) = text.split_once("## Promises and their tests").context("no such section")?;
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter(|line| line.starts_with("| ")).skip(1);
    let mut promises = 0;
    for row in rows {
        let [_, promise, tests, _] = row.split('|').collect::<Vec<_>>()[..] else {
            anyhow::bail!("a row with other columns: {row}");
        };
        let (mut source, mut found) = (None, 0);
        for name in quoted(tests) {
            if name.contains('/') {
                let path = workspace().join(name);
                source = Some((name, fs::read_to_string(&path).with_context(|| name.to_owned())?));
                continue;
            }
            let (file, source) =
                source.as_ref().with_context(|| format!("{name}: of which file?"))?;
            let at =
                source.find(&format!("fn {name}(")).with_context(|| format!("{file}: {name}"))?;
            // The attributes and comments of the function, up to a blank line.
            let above = source[..at].rsplit("\n\n").next().unwrap_or_default();
            // Test attributes may have options: #[tokio::test(flavor = "multi_thread")].
            let test = above.contains("test]") || above.contains("test(");
            ensure!(test, "{file}: {name} is not a test.");
            found += 1;
        }
        ensure!(found > 0, "This promise has no test: {promise}");
        promises += 1;
    }
    ensure!(promises > 10, "Only {promises} promises were found.");
    Ok(())
}

/// Returns the lines of a source, without its tests, that compare a word for a secret by `==` or
/// `!=`.
fn comparisons(source: &str) -> Vec<&str> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default().lines();
    let secret = |word: &str| {
        if word.contains(".len()") {
            return false;
        }
        let word = word.trim_start_matches(['*', '&', '(', '!']).trim_start_matches("self.");
        let word = word.split(['.', '(', '[', ')', ',']).next().unwrap_or_default();
        [
            "check",
            "mac",
            "mac1",
            "mac2",
            "cookie",
            "secret",
            "private",
            "tag",
            "second",
            "private_key",
        ]
        .contains(&word)
    };
    let compares = |line: &&str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let around = |at: usize| words.get(at.wrapping_sub(1)).into_iter().chain(words.get(at + 1));
        let operators = words.iter().enumerate().filter(|(_, word)| ["==", "!="].contains(word));
        operators.into_iter().any(|(at, _)| around(at).any(|word| secret(word)))
    };
    code.filter(|line| !line.trim_start().starts_with("//"))
        .filter(compares)
        .map(str::trim)
        .collect()
}

/// The comparison with the mac2 of a message without a cookie, which is public.
const NO_COOKIE: &str = "let is_present = *check.mac2 != [0; MAC_LEN];";

#[test]
fn secrets_are_compared_in_constant_time() -> Result<()> {
    let mut read = 0;
    let mut sources = Vec::new();
    for directory in ["", "engine", "peer"] {
        let directory = workspace().join("agent/core/src/tunnel").join(directory);
        for entry in fs::read_dir(directory)? {
            sources.push(entry?.path());
        }
    }
    sources.extend(
        ["agent/ipc/src/keys.rs", "agent/dataplane/src/memory.rs"].map(|p| workspace().join(p)),
    );
    for path in sources.iter().filter(|path| path.extension().is_some_and(|e| e == "rs")) {
        let source = fs::read_to_string(path)?;
        for line in comparisons(&source) {
            let is_known = line == NO_COOKIE;
            ensure!(is_known, "{} compares a secret: {line}", path.display());
        }
        read += 1;
    }
    ensure!(read > 15, "Only {read} files were read.");
    let cookie = fs::read_to_string(workspace().join("agent/core/src/tunnel/cookie.rs"))?;
    ensure!(cookie.contains("constant_time::verify_slices_are_equal"));
    ensure!(comparisons("if mac == other {\n").len() == 1 && comparisons("a == b\n").is_empty());
    Ok(())
}

#[test]
fn links_and_headings_are_found() {
    let text =
        "# A title: of `two` parts\n[a](b.md#c), `[no](link)`\n```\n# [no](code)\n```\n[d](#e)";
    assert_eq!(targets(text), ["b.md#c", "#e"]);
    assert_eq!(anchors(text), BTreeSet::from(["a-title-of-two-parts".to_owned()]));
}

/// The dictionary is `typos.toml`.
#[test]
fn spelling_is_right() -> Result<()> {
    let mut typos = std::process::Command::new(skein_lab::programs::typos()?);
    let typos = typos.args(["--format", "brief"]).current_dir(workspace());
    let checked = skein_lab::process::finish(typos, &[], std::time::Duration::from_secs(60))?;
    ensure!(checked.code == 0, "unknown words:\n{}{}", checked.stdout, checked.stderr);
    Ok(())
}

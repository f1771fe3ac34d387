//! The documents: what they refer to is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use skein_e2e::cargo::workspace;

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

/// Targets of Markdown links that are not in code.
fn targets(text: &str) -> Vec<&str> {
    // Text and code take turns: first at fences, then at single backquotes.
    let prose = text.split("```").step_by(2).flat_map(|part| part.split('`').step_by(2));
    let links = prose.flat_map(|part| part.split("](").skip(1));
    links.filter_map(|rest| rest.split(')').next()).collect()
}

/// What a heading can be referred to by.
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

/// Checks one link; true if it stays in this repository.
fn check(document: &Path, text: &str, target: &str) -> Result<bool> {
    if ["https:", "http:", "mailto:"].iter().any(|scheme| target.starts_with(scheme)) {
        return Ok(false);
    }
    let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
    let file = match path {
        "" => document.to_owned(),
        path => document.parent().context("no directory")?.join(path),
    };
    ensure!(file.exists(), "there is no {}", file.display());
    if !anchor.is_empty() {
        let linked = if path.is_empty() { text.to_owned() } else { fs::read_to_string(&file)? };
        ensure!(anchors(&linked).contains(anchor), "no such heading");
    }
    Ok(true)
}

#[test]
fn relative_links_lead_somewhere() -> Result<()> {
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
    ensure!(checked > 5, "only {checked} links found: is this test still reading them?");
    Ok(())
}

#[test]
fn links_and_headings_are_found() {
    let text =
        "# A title: of `two` parts\n[a](b.md#c), `[no](link)`\n```\n# [no](code)\n```\n[d](#e)";
    assert_eq!(targets(text), ["b.md#c", "#e"]);
    assert_eq!(anchors(text), BTreeSet::from(["a-title-of-two-parts".to_owned()]));
}

//! The container image: the same bytes from the same programs, and enough in it and around it for both
//! processes of the agent.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use skein_e2e::image;
use skein_e2e::lab::process;

/// What the image may weigh, in bytes: a node pulls it before it has a network.
const LIMIT: u64 = 24 << 20;

fn member(archive: &Path, name: &str) -> Result<Value> {
    let text = process::run(Command::new("tar").arg("-xOf").arg(archive).arg(name))?;
    serde_json::from_str(&text).with_context(|| name.to_owned())
}

#[test]
fn the_same_programs_make_the_same_image() -> Result<()> {
    let first = image::build()?;
    let directory = tempfile::tempdir()?;
    let second = directory.path().join("second.tar");
    image::pack(first.parent().context("no directory")?, &second)?;
    ensure!(fs::read(&first)? == fs::read(&second)?, "two builds differ");
    Ok(())
}

#[test]
fn the_image_is_small_and_says_what_it_is() -> Result<()> {
    let archive = image::build()?;
    let size = fs::metadata(&archive)?.size();
    ensure!(size < LIMIT, "{size} bytes");
    println!("the image has {:.1} MiB", size as f64 / f64::from(1 << 20));
    let manifest = &member(&archive, "manifest.json")?[0];
    let tags = manifest["RepoTags"].to_string();
    ensure!(tags.contains(image::REFERENCE), "{tags}");
    let config = member(&archive, manifest["Config"].as_str().context("no configuration")?)?;
    let labels: BTreeMap<String, String> =
        serde_json::from_value(config["config"]["Labels"].clone())?;
    for (label, value) in
        [("title", "Skein"), ("version", env!("CARGO_PKG_VERSION")), ("licenses", "Apache-2.0")]
    {
        let label = format!("org.opencontainers.image.{label}");
        ensure!(labels.get(&label).map(String::as_str) == Some(value), "{label}: {labels:?}");
    }
    ensure!(config["config"]["Entrypoint"][0] == "/usr/bin/skein-agent", "{config:#}");
    Ok(())
}

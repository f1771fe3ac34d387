//! The seeds of the fuzz targets as ordinary tests: unchanged, truncated at every length, and with
//! each byte changed.

#![allow(clippy::unwrap_used)]

use skein_cni::config::Config;
use skein_cni::environment::Environment;
use skein_cni_protocol::{AttachmentId, Request, Response};

fn variations(target: &str) -> Vec<Vec<u8>> {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus");
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("{corpus}/{target}")).unwrap() {
        let seed = std::fs::read(entry.unwrap().path()).unwrap();
        all.extend((0..seed.len()).map(|length| seed[..length].to_vec()));
        for (index, change) in
            (0..seed.len()).flat_map(|index| [0, 1, 0x80, 0xff].map(|c| (index, c)))
        {
            let mut changed = seed.clone();
            changed[index] ^= change;
            all.push(changed);
        }
    }
    assert!(all.len() > 500, "the corpus has too few seeds");
    all
}

#[test]
fn varied_configurations_and_requests_do_not_panic() {
    let mut good = 0;
    for data in variations("cni_config") {
        good += usize::from(Config::parse(&data).is_ok());
        good += usize::from(serde_json::from_slice::<Request>(&data).is_ok());
    }
    assert!(good > 10, "{good}");
}

#[test]
fn varied_frames_do_not_panic() {
    let mut good = 0;
    for data in variations("cni_frames") {
        good += usize::from(skein_cni_protocol::frame::read::<Request>(&mut &data[..]).is_ok());
        good += usize::from(skein_cni_protocol::frame::read::<Response>(&mut &data[..]).is_ok());
        good += usize::from(serde_json::from_slice::<AttachmentId>(&data).is_ok());
    }
    assert!(good > 10, "{good}");
}

#[test]
fn varied_environments_do_not_panic() {
    let mut good = 0;
    for data in variations("cni_environment") {
        let Ok(text) = std::str::from_utf8(&data) else { continue };
        let environment = Environment::read(|name| {
            let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix('=')?.to_owned());
            text.lines().find_map(value)
        });
        good += usize::from(matches!(environment, Ok(Some(_))));
    }
    assert!(good > 10, "{good}");
}

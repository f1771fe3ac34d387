//! The network configuration list (CNI specification 1.1.0, section 1).
//!
//! Other programs add entries to the list: istio-cni and linkerd-cni append a plugin to the file
//! that the runtime reads. Skein compares and repairs its own entries and keys only.

use serde_json::{Map, Value, json};

use crate::config::Cni;
use crate::status::Offer;

/// Name of the plugin's binary, and its `type` in the configuration.
pub(super) const PLUGIN: &str = "skein-cni";

/// Key of the list with the types of the entries that Skein wrote after its own. The key
/// distinguishes an entry that a later configuration no longer has from an entry of another
/// program.
const CHAIN_KEY: &str = "skein.network/chain";

/// Types of plugins that lists of earlier versions had after Skein's. Those lists have no
/// [`CHAIN_KEY`].
const EARLIER_CHAIN: [&str; 5] = ["portmap", "bandwidth", "tuning", "firewall", "sbr"];

/// Network configuration list: a JSON object with the key `plugins`.
pub(super) type List = Map<String, Value>;

/// Returns the list that Skein writes if there is no list.
pub(super) fn wanted(config: &Cni, offer: &Offer) -> List {
    let ours = json!({
        "type": PLUGIN,
        "capabilities": { "ips": true },
        "socket": config.socket,
        "spool": config.spool,
    });
    let plugins: Vec<Value> = std::iter::once(ours).chain(config.chain.iter().cloned()).collect();
    let chain: Vec<&str> = config.chain.iter().filter_map(plugin_type).collect();
    let list = [
        ("cniVersion", json!(offer.conservative())),
        ("cniVersions", json!(offer.versions)),
        ("name", json!(config.network)),
        (CHAIN_KEY, json!(chain)),
        ("plugins", json!(plugins)),
    ];
    list.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// Returns the types of the entries that other programs added to the list `present`, in its order.
pub(super) fn foreign_types(config: &Cni, present: &[u8]) -> Vec<String> {
    let Some(list) = parse(present) else { return Vec::new() };
    let own = OwnTypes::new(&config.chain, &list);
    let types = plugins(&list).iter().filter_map(plugin_type).filter(|name| !own.contains(name));
    types.map(str::to_owned).collect()
}

/// Returns the list that should replace `present`; `None` if Skein's part of `present` is correct.
///
/// Entries of other programs keep their order, before or after Skein's. A file that is not a list
/// is replaced.
pub(super) fn repaired(wanted: List, present: &[u8]) -> Option<List> {
    let Some(mut list) = parse(present) else { return Some(wanted) };
    let ours = plugins(&wanted).to_vec();
    let own = OwnTypes::new(&ours, &list);
    let is_own = |plugin: &Value| plugin_type(plugin).is_some_and(|name| own.contains(name));
    let present = plugins(&list);
    // Every runtime refuses a list with an entry that has no type.
    let valid = present.iter().all(|plugin| plugin_type(plugin).is_some());
    let mut changed = !valid || !present.iter().filter(|plugin| is_own(plugin)).eq(&ours);
    if changed {
        let first = present.iter().position(is_own).unwrap_or(0);
        let foreign = |part: &[Value]| {
            let others =
                part.iter().filter(|plugin| plugin_type(plugin).is_some() && !is_own(plugin));
            others.cloned().collect::<Vec<_>>()
        };
        let plugins = [foreign(&present[..first]), ours, foreign(&present[first..])].concat();
        list.insert("plugins".to_owned(), plugins.into());
    }
    for (key, value) in wanted {
        if key != "plugins" && list.get(&key) != Some(&value) {
            list.insert(key, value);
            changed = true;
        }
    }
    changed.then_some(list)
}

/// Returns the types of all plugins of a configuration file, which holds a list or a single plugin.
pub(super) fn types(text: &[u8]) -> Vec<String> {
    let Ok(document) = serde_json::from_slice::<Value>(text) else { return Vec::new() };
    let listed = document["plugins"].as_array().map(Vec::as_slice).unwrap_or_default();
    let all = listed.iter().chain([&document]).filter_map(plugin_type);
    all.map(str::to_owned).collect()
}

/// Repairs `data` as the list of the file, for the fuzzer. A repaired list needs no second repair,
/// and has the same entries of other programs.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_conflist(data: &[u8]) {
    let config = crate::config::Config::parse("name = 'a'").expect("every key has a default").cni;
    let offer = Offer { versions: vec!["1.0.0".to_owned()], limits: Vec::new() };
    let _ = types(data);
    let Some(list) = repaired(wanted(&config, &offer), data) else { return };
    let text = serde_json::to_vec(&list).expect("plain values");
    assert!(repaired(wanted(&config, &offer), &text).is_none());
    assert_eq!(foreign_types(&config, &text), foreign_types(&config, data));
}

/// Types of the entries that are Skein's.
struct OwnTypes(Vec<String>);

impl OwnTypes {
    fn new(chain: &[Value], list: &List) -> Self {
        let written = list.get(CHAIN_KEY).and_then(Value::as_array).into_iter().flatten();
        let types = chain.iter().filter_map(plugin_type).chain(written.filter_map(Value::as_str));
        let has_plugin = plugins(list).iter().filter_map(plugin_type).any(|name| name == PLUGIN);
        let is_earlier = has_plugin && !list.contains_key(CHAIN_KEY);
        let types = types.chain(EARLIER_CHAIN.into_iter().filter(|_| is_earlier));
        Self(types.chain([PLUGIN]).map(str::to_owned).collect())
    }

    fn contains(&self, name: &str) -> bool {
        self.0.iter().any(|own| own == name)
    }
}

fn parse(text: &[u8]) -> Option<List> {
    serde_json::from_slice::<List>(text)
        .ok()
        .filter(|list| list.get("plugins").is_some_and(Value::is_array))
}

fn plugins(list: &List) -> &[Value] {
    list.get("plugins").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn plugin_type(plugin: &Value) -> Option<&str> {
    plugin["type"].as_str()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(chain: &str) -> Cni {
        crate::config::Config::parse(&format!("name = 'a'\n[cni]\nchain = {chain}\n")).unwrap().cni
    }

    fn offer(versions: &[&str]) -> Offer {
        Offer { versions: versions.iter().map(|name| (*name).to_owned()).collect(), limits: vec![] }
    }

    fn list() -> List {
        wanted(&config("[{ type = 'portmap' }]"), &offer(&["1.0.0", "1.1.0"]))
    }

    fn text(list: &List) -> Vec<u8> {
        serde_json::to_vec(list).unwrap()
    }

    fn insert(list: &mut List, index: usize, plugin: Value) {
        list["plugins"].as_array_mut().unwrap().insert(index, plugin);
    }

    fn order(list: &List) -> Vec<&str> {
        plugins(list).iter().map(|plugin| plugin["type"].as_str().unwrap()).collect()
    }

    #[test]
    fn list_names_plugin_socket_chain_and_versions() {
        let list = list();
        assert_eq!(list["cniVersion"], "1.0.0");
        assert_eq!(list["cniVersions"], json!(["1.0.0", "1.1.0"]));
        assert_eq!(list["plugins"][0]["type"], "skein-cni");
        assert_eq!(list["plugins"][0]["socket"], "/run/skein/cni.sock");
        assert_eq!(order(&list), ["skein-cni", "portmap"]);
    }

    #[test]
    fn entries_of_other_programs_stay_in_their_order() {
        let istio = json!({ "type": "istio-cni", "kubernetes": { "kubeconfig": "/x" } });
        let linkerd = json!({ "type": "linkerd-cni" });
        for (istio_at, linkerd_at) in [(2, 3), (0, 3), (1, 2), (0, 0), (2, 0)] {
            let mut present = list();
            insert(&mut present, istio_at, istio.clone());
            insert(&mut present, linkerd_at, linkerd.clone());
            assert_eq!(repaired(list(), &text(&present)), None, "{istio_at} {linkerd_at}");
            // A damaged entry of Skein is repaired; the other entries stay.
            let own = plugins(&present).iter().position(|p| p["type"] == "skein-cni").unwrap();
            present["plugins"][own]["socket"] = "/elsewhere".into();
            let repaired = repaired(list(), &text(&present)).unwrap();
            let ours: Vec<&Value> =
                plugins(&repaired).iter().filter(|p| plugins(&list()).contains(p)).collect();
            assert_eq!(ours.len(), 2, "{repaired:?}");
            assert!(plugins(&repaired).contains(&istio) && plugins(&repaired).contains(&linkerd));
            assert_eq!(repaired["plugins"].as_array().unwrap().len(), 4);
        }
    }

    #[test]
    fn own_entries_are_repaired_in_place() {
        let mut present = list();
        insert(&mut present, 0, json!({ "type": "first" }));
        insert(&mut present, 3, json!({ "type": "istio-cni" }));
        let whole = present.clone();
        let damages: [fn(&mut Vec<Value>); 5] = [
            |all| drop(all.remove(1)),
            |all| drop(all.remove(2)),
            |all| all.swap(1, 2),
            |all| all.push(json!({ "type": "skein-cni" })),
            |all| all.push(json!(7)),
        ];
        for (number, damage) in damages.into_iter().enumerate() {
            let mut damaged = whole.clone();
            damage(damaged["plugins"].as_array_mut().unwrap());
            let repaired = repaired(list(), &text(&damaged)).unwrap();
            assert_eq!(order(&repaired), order(&whole), "damage {number}");
        }
        // Without any entry of its own, Skein comes first.
        let mut damaged = whole;
        damaged["plugins"] = json!([{ "type": "istio-cni" }]);
        let repaired = repaired(list(), &text(&damaged)).unwrap();
        assert_eq!(order(&repaired), ["skein-cni", "portmap", "istio-cni"]);
    }

    #[test]
    fn keys_of_the_list_are_repaired_and_others_stay() {
        let mut present = list();
        present.insert("disableGC".to_owned(), true.into());
        insert(&mut present, 2, json!({ "type": "istio-cni" }));
        assert_eq!(repaired(list(), &text(&present)), None);
        present.insert("cniVersion".to_owned(), "0.3.1".into());
        present.remove("name");
        let repaired = repaired(list(), &text(&present)).unwrap();
        assert_eq!(
            (&repaired["cniVersion"], &repaired["name"]),
            (&json!("1.0.0"), &json!("skein"))
        );
        assert_eq!(repaired["disableGC"], true);
        assert_eq!(order(&repaired), ["skein-cni", "portmap", "istio-cni"]);
    }

    #[test]
    fn entry_that_left_the_chain_goes_and_foreign_stays() {
        let before = config("[{ type = 'portmap' }, { type = 'bandwidth' }]");
        let mut present = wanted(&before, &offer(&["1.0.0"]));
        insert(&mut present, 3, json!({ "type": "istio-cni" }));
        let after = config("[{ type = 'tuning' }]");
        assert_eq!(foreign_types(&after, &text(&present)), ["istio-cni"]);
        let repaired = repaired(wanted(&after, &offer(&["1.0.0"])), &text(&present)).unwrap();
        assert_eq!(order(&repaired), ["skein-cni", "tuning", "istio-cni"]);
    }

    #[test]
    fn entry_of_earlier_version_that_left_the_chain_goes() {
        let mut present = list();
        present.remove(CHAIN_KEY);
        for name in ["bandwidth", "tuning", "istio-cni", "sbr", "firewall"] {
            insert(&mut present, 2, json!({ "type": name }));
        }
        let after = config("[{ type = 'bandwidth' }]");
        assert_eq!(foreign_types(&after, &text(&present)), ["istio-cni"]);
        let repaired = repaired(wanted(&after, &offer(&["1.0.0"])), &text(&present)).unwrap();
        assert_eq!(order(&repaired), ["skein-cni", "bandwidth", "istio-cni"]);
        // Without an entry of Skein's, the list is not one that Skein wrote.
        present["plugins"] = json!([{ "type": "tuning" }]);
        assert_eq!(foreign_types(&after, &text(&present)), ["tuning"]);
    }

    #[test]
    fn file_that_is_not_a_list_is_replaced() {
        for text in ["", "{", "[]", "{}", "7", "{\"plugins\":{}}", "{\"type\":\"skein-cni\"}"] {
            assert_eq!(repaired(list(), text.as_bytes()), Some(list()), "{text}");
            assert!(foreign_types(&config("[]"), text.as_bytes()).is_empty());
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "\\PC*") {
            for input in [&bytes[..], text.as_bytes()] {
                let _ = repaired(list(), input);
                let _ = (foreign_types(&config("[]"), input), types(input));
            }
        }
    }
}

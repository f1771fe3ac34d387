//! What the runtime says by environment variables (CNI specification 1.1.0, section 2), checked.

use std::path::PathBuf;

use skein_cni_protocol::excerpt::excerpt;
use skein_cni_protocol::names::check_id;
use skein_cni_protocol::types::ErrorCode;
use skein_cni_protocol::{AttachmentId, Pod};

use crate::types::PluginError;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Attach.
    Add,
    /// Detach.
    Del,
    /// Is it as it was made?
    Check,
    /// Collect garbage.
    Gc,
    /// Could an ADD be served?
    Status,
    /// Which versions?
    Version,
}

/// The variables, checked for the operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub operation: Operation,
    /// `CNI_CONTAINERID` and `CNI_IFNAME`; empty where the operation has none.
    pub id: AttachmentId,
    /// `CNI_NETNS`.
    pub netns: Option<PathBuf>,
    /// `CNI_NETNS_OVERRIDE`: the plugin's own namespace is meant.
    pub netns_override: bool,
    /// The pod of `CNI_ARGS`.
    pub pod: Option<Pod>,
}

impl Environment {
    /// Reads and checks the variables that `get` knows; `None` without `CNI_COMMAND`.
    pub fn read(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, PluginError> {
        let given = |name: &str| get(name).filter(|value| !value.is_empty());
        let Some(command) = given("CNI_COMMAND") else { return Ok(None) };
        let (operation, needed): (_, &[&str]) = match command.as_str() {
            // The specification requires CNI_PATH for GC only.
            "ADD" => (Operation::Add, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            "CHECK" => (Operation::Check, &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"]),
            "DEL" => (Operation::Del, &["CNI_CONTAINERID", "CNI_IFNAME"]),
            "GC" => (Operation::Gc, &["CNI_PATH"]),
            "STATUS" => (Operation::Status, &[]),
            "VERSION" => (Operation::Version, &[]),
            other => {
                let other = excerpt(other);
                return Err(environment(format!(
                    "CNI_COMMAND is {other:?}: ADD, DEL, CHECK, GC, STATUS and VERSION are known"
                )));
            }
        };
        let missing: Vec<&str> =
            needed.iter().copied().filter(|name| given(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(environment(format!("required: {}", missing.join(", "))));
        }
        let id = AttachmentId {
            container_id: given("CNI_CONTAINERID").unwrap_or_default(),
            ifname: given("CNI_IFNAME").unwrap_or_default(),
        };
        if needed.contains(&"CNI_CONTAINERID") {
            check_id(&id)?;
        }
        let pod = match operation {
            // A deletion does not fail by what it does not need.
            Operation::Add | Operation::Check => arguments(&given("CNI_ARGS").unwrap_or_default())?,
            _ => None,
        };
        Ok(Some(Self {
            operation,
            id,
            netns: given("CNI_NETNS").map(PathBuf::from),
            netns_override: matches!(
                given("CNI_NETNS_OVERRIDE").as_deref(),
                Some("1" | "t" | "T" | "true" | "TRUE" | "True")
            ),
            pod,
        }))
    }
}

/// `CNI_ARGS`: `KEY=VALUE` pairs by semicolons. Keys that are not known are an error unless
/// `IgnoreUnknown` says otherwise, as in the reference plugins.
fn arguments(text: &str) -> Result<Option<Pod>, PluginError> {
    let (mut pod, mut unknown, mut ignore, mut any) = (Pod::default(), Vec::new(), false, false);
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            let pair = excerpt(pair);
            return Err(environment(format!("CNI_ARGS: {pair:?} is no KEY=VALUE")));
        };
        match key {
            "IgnoreUnknown" => {
                ignore = match value {
                    "1" | "true" | "True" | "TRUE" | "t" | "T" => true,
                    "0" | "false" | "False" | "FALSE" | "f" | "F" => false,
                    _ => {
                        let value = excerpt(value);
                        return Err(environment(format!(
                            "CNI_ARGS: IgnoreUnknown is {value:?}: use 1 or 0"
                        )));
                    }
                }
            }
            "K8S_POD_NAMESPACE" => (pod.namespace, any) = (value.to_owned(), true),
            "K8S_POD_NAME" => (pod.name, any) = (value.to_owned(), true),
            "K8S_POD_UID" => pod.uid = Some(value.to_owned()),
            "K8S_POD_INFRA_CONTAINER_ID" => {}
            other => unknown.push(other),
        }
    }
    if !unknown.is_empty() && !ignore {
        return Err(environment(format!(
            "CNI_ARGS: unknown {}: add IgnoreUnknown=1",
            excerpt(&unknown.join(", "))
        )));
    }
    Ok(any.then_some(pod))
}

fn environment(msg: String) -> PluginError {
    PluginError::new(ErrorCode::InvalidEnvironment, msg)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ADD: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "c1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
    ];

    fn read(changes: &[(&str, &str)]) -> Result<Option<Environment>, PluginError> {
        let changed = |name: &str| changes.iter().find(|(key, _)| *key == name);
        let usual = |name: &str| ADD.iter().find(|(key, _)| *key == name);
        Environment::read(|name| {
            changed(name).or_else(|| usual(name)).map(|(_, value)| (*value).to_owned())
        })
    }

    fn refused(changes: &[(&str, &str)]) -> String {
        let error = read(changes).unwrap_err();
        assert_eq!(error.code, 4);
        error.msg
    }

    #[test]
    fn every_missing_variable_is_named() {
        assert_eq!(read(&[("CNI_COMMAND", "")]), Ok(None));
        let all =
            [("CNI_CONTAINERID", ""), ("CNI_NETNS", ""), ("CNI_IFNAME", ""), ("CNI_PATH", "")];
        let add = refused(&all);
        assert_eq!(add, "required: CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME");
        let with = |operation| [&all[..], &[("CNI_COMMAND", operation)]].concat();
        assert_eq!(refused(&with("DEL")), "required: CNI_CONTAINERID, CNI_IFNAME");
        assert_eq!(refused(&with("GC")), "required: CNI_PATH");
        assert_eq!(read(&with("VERSION")).unwrap().unwrap().operation, Operation::Version);
        assert!(refused(&[("CNI_COMMAND", "FROB")]).contains("FROB"));
        let without = read(&[("CNI_COMMAND", "DEL"), ("CNI_NETNS", "")]).unwrap().unwrap();
        assert_eq!(without.netns, None);
    }

    #[test]
    fn cni_path_is_required_for_gc_only() {
        for operation in ["ADD", "DEL", "CHECK", "STATUS", "VERSION"] {
            let environment = read(&[("CNI_COMMAND", operation), ("CNI_PATH", "")]);
            assert!(environment.is_ok(), "{operation} fails without CNI_PATH: {environment:?}");
        }
        assert_eq!(refused(&[("CNI_COMMAND", "GC"), ("CNI_PATH", "")]), "required: CNI_PATH");
    }

    #[test]
    fn names_are_checked() {
        for id in ["-x", "a/b", "a b", "a\n", "ä", ".a"] {
            assert!(refused(&[("CNI_CONTAINERID", id)]).contains("CNI_CONTAINERID"), "{id}");
        }
        for name in [".", "..", "a/b", "a:b", "a b", "a\tb", "sixteen-bytes-xx"] {
            assert!(refused(&[("CNI_IFNAME", name)]).contains("CNI_IFNAME"), "{name}");
        }
        assert!(
            read(&[("CNI_CONTAINERID", "0a.B_c-9"), ("CNI_IFNAME", "fifteen-bytes-x")]).is_ok()
        );
    }

    #[test]
    fn arguments_name_the_pod() {
        let text = "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;\
                    K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u;OTHER=x=y";
        let pod = read(&[("CNI_ARGS", text)]).unwrap().unwrap().pod.unwrap();
        assert_eq!((pod.namespace.as_str(), pod.name.as_str()), ("ns", "web-0"));
        assert_eq!(pod.uid.as_deref(), Some("u"));
        assert!(refused(&[("CNI_ARGS", "FOO=1")]).contains("FOO"));
        assert!(refused(&[("CNI_ARGS", "FOO")]).contains("KEY=VALUE"));
        assert!(refused(&[("CNI_ARGS", "IgnoreUnknown=maybe")]).contains("maybe"));
        assert_eq!(read(&[("CNI_ARGS", "IgnoreUnknown=true;A=1")]).unwrap().unwrap().pod, None);
    }

    proptest! {
        #[test]
        fn nothing_panics(name in "\\PC*", value in "\\PC*", text in "[A-Za-z=;0-9]*") {
            let _ = read(&[("CNI_CONTAINERID", &name), ("CNI_IFNAME", &value)]);
            let _ = read(&[("CNI_ARGS", &value)]);
            let _ = read(&[("CNI_ARGS", &text)]);
        }
    }
}

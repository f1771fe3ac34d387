//! Result document of an ADD (CNI specification 1.1.0, section 5), in the version of the network
//! configuration.

use serde_json::{Map, Value, json};
use skein_cni_protocol::types::{ErrorCode, Version};
use skein_cni_protocol::{Attached, Ip, Route};

use crate::types::{Dns, PluginError};

/// Returns the result document of an attachment. `sandbox` is the path of the network namespace as
/// the runtime passed it. `previous` is the result of the previous plugins; its entries come first.
///
/// # Errors
/// `Decoding` if `previous` fails [`check_previous`].
pub fn document(
    version: Version,
    attached: &Attached,
    sandbox: &str,
    dns: &Dns,
    previous: Option<Value>,
) -> Result<Value, PluginError> {
    match version < Version::V0_3_0 {
        true => Ok(flat(version, attached, dns)),
        false => nested(version, attached, sandbox, dns, previous),
    }
}

/// Checks that [`document`] can append to the result of the previous plugins.
///
/// # Errors
/// `Decoding` if `previous` is not an object, or if its `interfaces`, `ips` or `routes` has another
/// type than list. A missing entry or `null` counts as an empty list.
pub fn check_previous(previous: Option<&Value>) -> Result<(), PluginError> {
    let mut previous = match previous {
        None => return Ok(()),
        Some(Value::Object(previous)) => previous.clone(),
        Some(_) => return Err(not_an_object()),
    };
    ["interfaces", "ips", "routes"].iter().try_for_each(|key| list(&mut previous, key).map(drop))
}

fn not_an_object() -> PluginError {
    PluginError::new(ErrorCode::Decoding, "prevResult is not an object")
}

/// Returns the result in the form of version 0.3.0 and later.
fn nested(
    version: Version,
    attached: &Attached,
    sandbox: &str,
    dns: &Dns,
    previous: Option<Value>,
) -> Result<Value, PluginError> {
    let mut result = match previous {
        None => Map::new(),
        Some(Value::Object(previous)) => previous,
        Some(_) => return Err(not_an_object()),
    };
    result.insert("cniVersion".to_owned(), version.name().into());
    let interface = |interface: &skein_cni_protocol::Interface, sandbox: Option<&str>| {
        let mut value = json!({ "name": interface.name, "mac": interface.mac });
        if let Some(sandbox) = sandbox {
            value["sandbox"] = sandbox.into();
        }
        if version >= Version::V1_1_0 {
            value["mtu"] = interface.mtu.into();
        }
        value
    };
    let before = list(&mut result, "interfaces")?.len();
    list(&mut result, "interfaces")?
        .extend([interface(&attached.host, None), interface(&attached.container, Some(sandbox))]);
    let ip = |ip: &Ip| {
        let mut value = json!({
            "address": ip.address, "gateway": ip.gateway, "interface": before + 1,
        });
        if version < Version::V1_0_0 {
            value["version"] = if ip.address.addr().is_ipv4() { "4" } else { "6" }.into();
        }
        value
    };
    list(&mut result, "ips")?.extend(attached.ips.iter().map(ip));
    list(&mut result, "routes")?.extend(attached.routes.iter().map(route));
    if !dns.is_empty() && result.get("dns").is_none_or(|present| *present == json!({})) {
        result.insert("dns".to_owned(), json!(dns));
    }
    Ok(Value::Object(result))
}

fn list<'a>(
    result: &'a mut Map<String, Value>,
    key: &str,
) -> Result<&'a mut Vec<Value>, PluginError> {
    let entry = result.entry(key).or_insert(Value::Null);
    if entry.is_null() {
        *entry = Value::Array(Vec::new());
    }
    let wrong = || PluginError::new(ErrorCode::Decoding, format!("prevResult.{key} is not a list"));
    entry.as_array_mut().ok_or_else(wrong)
}

/// Returns the result in the form of versions 0.1.0 and 0.2.0: one address per address family, no
/// interfaces.
fn flat(version: Version, attached: &Attached, dns: &Dns) -> Value {
    let mut result = json!({ "cniVersion": version.name() });
    for (key, v4) in [("ip4", true), ("ip6", false)] {
        let ours = |ip: &&Ip| ip.address.addr().is_ipv4() == v4;
        let Some(ip) = attached.ips.iter().find(ours) else { continue };
        let routes = attached.routes.iter().filter(|route| route.dst.addr().is_ipv4() == v4);
        result[key] = json!({
            "ip": ip.address, "gateway": ip.gateway, "routes": routes.map(route).collect::<Vec<_>>(),
        });
    }
    if !dns.is_empty() {
        result["dns"] = json!(dns);
    }
    result
}

fn route(route: &Route) -> Value {
    match route.gw {
        Some(gw) => json!({ "dst": route.dst, "gw": gw }),
        None => json!({ "dst": route.dst }),
    }
}

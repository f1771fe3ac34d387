//! Refusal of `cluster_cidrs` that contain the API server or Services. The unreachable routes for
//! such prefixes would cut the node off from them.

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::{Api, Client};

use super::client::describe;
use crate::config::{Config, check_outside, overlap};
use crate::failure::Failure;

/// Timeout of the name resolution of the API server, and of the request for the Service ranges.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(4);

/// Addresses and prefixes of the cluster outside the pod network.
#[derive(Clone)]
pub(super) struct Ranges {
    client: Client,
    /// Host of the API server's URL: an address or a name.
    server: String,
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ranges").field("server", &self.server).finish_non_exhaustive()
    }
}

impl Ranges {
    pub(super) fn new(client: Client, server: String) -> Self {
        Self { client, server }
    }

    /// Compares `cluster_cidrs` with the addresses of the API server and with the Service ranges,
    /// as far as they are known. A name that does not resolve is not checked, nor are the Service
    /// ranges of a cluster without ServiceCIDRs (before Kubernetes 1.33) or without the right to
    /// list them.
    ///
    /// # Errors
    ///
    /// [`Failure::Usage`] if `cluster_cidrs` contain an address of the API server, or overlap with
    /// a Service range.
    pub(super) async fn check(&self, config: &Config) -> Result<(), Failure> {
        let cluster = &config.cluster_cidrs;
        if cluster.is_empty() {
            return Ok(());
        }
        let (servers, services) = tokio::join!(self.servers(), self.services());
        check_outside(servers, cluster)
            .map_err(|error| Failure::Usage(format!("API server {}: {error}", self.server)))?;
        refuse_services(&services, cluster).map_err(|overlap| Failure::Usage(overlap.to_string()))
    }

    async fn servers(&self) -> Vec<IpAddr> {
        let host = self.server.trim_start_matches('[').trim_end_matches(']');
        if let Ok(address) = host.parse() {
            return vec![address];
        }
        let resolved = tokio::time::timeout(LOOKUP_TIMEOUT, tokio::net::lookup_host((host, 0)));
        match resolved.await {
            Ok(Ok(addresses)) => addresses.map(|address| address.ip()).collect(),
            Ok(Err(error)) => {
                tracing::debug!(host, %error, "name of the API server not compared with cluster_cidrs");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    async fn services(&self) -> Vec<IpNet> {
        let api: Api<ServiceCIDR> = Api::all(self.client.clone());
        let parameters = ListParams::default();
        match tokio::time::timeout(LOOKUP_TIMEOUT, api.list(&parameters)).await {
            Ok(Ok(list)) => {
                let specs = list.items.into_iter().filter_map(|item| item.spec);
                let cidrs = specs.flat_map(|spec| spec.cidrs.unwrap_or_default());
                cidrs.filter_map(|cidr| cidr.parse().ok()).collect()
            }
            Ok(Err(error)) => {
                let error = describe(&error);
                tracing::debug!(error, "Service ranges not compared with cluster_cidrs");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }
}

/// A prefix of `cluster_cidrs` overlaps with a Service range.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "cluster_cidrs: {net} overlaps with the Service range {service}, so that Services would be \
     unreachable. Set cluster_cidrs to prefixes that only pods have (the chart's podCidr and \
     podCidrv6)."
)]
struct ServiceOverlap {
    net: IpNet,
    service: IpNet,
}

fn refuse_services(services: &[IpNet], cluster: &[IpNet]) -> Result<(), ServiceOverlap> {
    for service in services {
        if let Some(net) = cluster.iter().find(|net| overlap(net, service)) {
            return Err(ServiceOverlap { net: *net, service: *service });
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn cluster_cidrs_over_a_service_range_are_refused() {
        let nets = |text: &str| [text.parse::<IpNet>().unwrap()];
        for (service, cluster) in [
            ("10.96.0.0/12", "10.0.0.0/8"),
            ("10.96.0.0/12", "10.96.128.0/24"),
            ("fd00:96::/112", "fd00::/16"),
        ] {
            let error = refuse_services(&nets(service), &nets(cluster)).unwrap_err().to_string();
            assert!(error.contains(service) && error.contains(cluster), "{error}");
        }
        let apart = refuse_services(&nets("10.96.0.0/12"), &nets("10.244.0.0/16"));
        assert_eq!(apart, Ok(()), "The ranges do not overlap.");
    }

    #[tokio::test]
    async fn cluster_cidrs_over_the_api_server_are_refused() {
        // No server listens at the address, so the Service ranges stay unknown.
        let url: http::Uri = "http://127.0.0.1:9".parse().unwrap();
        let client = Client::try_from(kube::Config::new(url)).unwrap();
        let ranges = |server: &str| Ranges::new(client.clone(), server.to_owned());
        let config = Config::parse("cluster_cidrs = ['10.0.0.0/8', 'fd00::/16']").unwrap();
        for server in ["10.96.0.1", "[fd00:96::1]"] {
            let error = ranges(server).check(&config).await.unwrap_err().to_string();
            assert!(error.contains(server) && error.contains("cluster_cidrs"), "{error}");
        }
        assert!(ranges("192.0.2.1").check(&config).await.is_ok(), "The server is elsewhere.");
        let open = Config::parse("").unwrap();
        assert!(ranges("10.96.0.1").check(&open).await.is_ok(), "Nothing is refused by default.");
    }
}

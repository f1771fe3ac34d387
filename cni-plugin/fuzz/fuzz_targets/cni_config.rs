#![no_main]

use skein_cni::config::Config;
use skein_cni_protocol::Request;

// Input: a network configuration on the plugin's standard input, or a request on the agent's
// socket.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = Config::parse(data);
    let _ = serde_json::from_slice::<Request>(data);
});

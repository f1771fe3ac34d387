#![no_main]

use skein_cni::config::Config;
use skein_cni_protocol::Request;

// What a runtime writes to the plugin's standard input, and what anybody writes to the agent's
// socket.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = Config::parse(data);
    let _ = serde_json::from_slice::<Request>(data);
});

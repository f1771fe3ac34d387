#![no_main]

use skein_cni_protocol::frame;
use skein_cni_protocol::{Response, AttachmentId, Request};

// What comes over the socket between plugin and agent, and what waits in the spool.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(request) = frame::read::<Request>(&mut &data[..]) {
        let again = frame::encode(&request).expect("it came in a frame");
        assert!(frame::read::<Request>(&mut &again[..]).is_ok());
    }
    if let Ok(answer) = frame::read::<Response>(&mut &data[..]) {
        let again = frame::encode(&answer).expect("it came in a frame");
        assert!(frame::read::<Response>(&mut &again[..]).is_ok_and(|again| again == answer));
    }
    let _ = serde_json::from_slice::<AttachmentId>(data);
});

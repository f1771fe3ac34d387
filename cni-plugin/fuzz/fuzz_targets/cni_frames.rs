#![no_main]

use skein_cni_protocol::frame;
use skein_cni_protocol::{AttachmentId, Request, Response};

// Input: bytes of the socket between plugin and agent, or of an entry of the spool.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Ok(request) = frame::read::<Request>(&mut &data[..]) {
        let again = frame::encode(&request).expect("a decoded message can be encoded");
        assert!(frame::read::<Request>(&mut &again[..]).is_ok());
    }
    if let Ok(answer) = frame::read::<Response>(&mut &data[..]) {
        let again = frame::encode(&answer).expect("a decoded message can be encoded");
        assert!(frame::read::<Response>(&mut &again[..]).is_ok_and(|again| again == answer));
    }
    let _ = serde_json::from_slice::<AttachmentId>(data);
});

//! Reads a body within its limits.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::Body;

/// Why a body was not read to its end, as the status that says so.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) status: StatusCode,
    pub(crate) why: String,
}

/// The whole body; each of its parts must come within `idle`.
pub(crate) async fn read<B>(mut body: B, max: usize, idle: Duration) -> Result<Bytes, Unread>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let too_large =
        || Unread { status: StatusCode::PAYLOAD_TOO_LARGE, why: format!("the body has more than {max} bytes") };
    let announced = body.size_hint().lower();
    if announced > max as u64 {
        return Err(too_large());
    }
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    while !body.is_end_stream() {
        let frame = match tokio::time::timeout(idle, body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                return Err(Unread { status: StatusCode::BAD_REQUEST, why: format!("the body broke off: {error}") });
            }
            Err(_) => {
                let why = format!("nothing of the body came for {idle:?}");
                return Err(Unread { status: StatusCode::REQUEST_TIMEOUT, why });
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > max {
            return Err(too_large());
        }
        if first.is_empty() {
            // Most bodies are one part, which is not copied.
            first = data;
        } else {
            if rest.is_empty() {
                rest.reserve((announced as usize).saturating_sub(first.len()).max(data.len()));
            }
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    let mut whole = BytesMut::with_capacity(first.len() + rest.len());
    whole.extend_from_slice(&first);
    whole.extend_from_slice(&rest);
    Ok(whole.freeze())
}

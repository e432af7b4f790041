//! Reads a body within its limits.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Body;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, timeout_at},
};

/// What a body may be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// The most bytes.
    pub(crate) bytes: usize,
    /// The longest silence between two of its parts.
    pub(crate) idle: Duration,
    /// The longest that all of it may take; a sender of single bytes would never be silent.
    pub(crate) whole: Duration,
}

/// The most that is reserved for a body before it is there.
const RESERVE: usize = 1024 * 1024;

/// Why a body was not read to its end, as the status that says so.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) status: StatusCode,
    pub(crate) why: String,
}

impl Unread {
    fn new(status: StatusCode, why: impl Into<String>) -> Self {
        Self { status, why: why.into() }
    }
}

/// Whether a body is not what was meant, but compressed or otherwise coded: nobody here takes it apart.
pub(crate) fn is_coded(headers: &HeaderMap) -> bool {
    let is_plain = |coding: &str| coding.trim().is_empty() || coding.trim().eq_ignore_ascii_case("identity");
    let codings = headers.get_all(header::CONTENT_ENCODING);
    !codings.iter().all(|value| value.to_str().is_ok_and(|codings| codings.split(',').all(is_plain)))
}

/// The whole body, and what it takes of `room`: bytes that there are for all bodies together.
pub(crate) async fn read<B>(
    mut body: B,
    limits: Limits,
    room: Option<&Semaphore>,
) -> Result<(Bytes, Option<SemaphorePermit<'_>>), Unread>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let max = limits.bytes;
    let too_large = || Unread::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the body has more than {max} bytes"));
    let announced = body.size_hint().lower();
    if announced > max as u64 {
        return Err(too_large());
    }
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    let mut held: Option<SemaphorePermit<'_>> = None;
    let end = Instant::now() + limits.whole;
    while !body.is_end_stream() {
        let frame = match timeout_at(end.min(Instant::now() + limits.idle), body.frame()).await {
            Ok(Some(Ok(frame))) => frame,
            Ok(None) => break,
            Ok(Some(Err(error))) => {
                return Err(Unread::new(StatusCode::BAD_REQUEST, format!("the body broke off: {error}")));
            }
            Err(_) => {
                let Limits { idle, whole, .. } = limits;
                let why = format!("nothing of the body came for {idle:?}, or it took longer than {whole:?} in all");
                return Err(Unread::new(StatusCode::REQUEST_TIMEOUT, why));
            }
        };
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > max {
            return Err(too_large());
        }
        if let Some(room) = room {
            let Some(more) = u32::try_from(data.len()).ok().and_then(|bytes| room.try_acquire_many(bytes).ok()) else {
                let why = "the bodies of other requests take all the room that there is";
                return Err(Unread::new(StatusCode::SERVICE_UNAVAILABLE, why));
            };
            match &mut held {
                Some(held) => held.merge(more),
                None => held = Some(more),
            }
        }
        if first.is_empty() && rest.is_empty() {
            // Most bodies are one part, which is not copied.
            first = data;
        } else {
            if !first.is_empty() {
                // As it was announced, but no more than a sender may take that sends nothing else.
                rest.reserve((announced as usize).min(RESERVE).max(first.len() + data.len()));
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok((if rest.is_empty() { first } else { rest.freeze() }, held))
}

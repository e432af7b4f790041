//! A place that requests go to, with what each of them has.

use std::{fmt, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Uri, header};
use http_body_util::Full;
use percent_encoding::percent_decode_str;
use polymq_core::{Error, ErrorKind, Result, config::redact_url};
use url::Url;

use crate::{
    NAME,
    client::{Link, Outbound},
    config::Http2,
};

/// Headers that most requests have: host, id, time and the two of the client. Made for all of them at once.
const USUAL_HEADERS: usize = 5;

/// A URL as requests need it: read once.
pub(crate) struct Place {
    uri: Uri,
    headers: HeaderMap,
    shows_token: bool,
    /// Spoken to in HTTP/1, where a request that got no answer is never made again.
    is_http1: bool,
}

impl Place {
    /// Credentials in the URL become a header, as a browser does it.
    pub(crate) fn new(link: &Link, mut url: Url) -> Result<Self> {
        let shows_token = link.config.shows_token_to(&url)?;
        let mut headers = HeaderMap::new();
        if let Some(login) = login(&url) {
            headers.insert(header::AUTHORIZATION, login);
        }
        // What cannot have a login has none.
        let _ = url.set_username("").and_then(|()| url.set_password(None));
        let uri = Uri::try_from(url.as_str()).map_err(|error| {
            let sentence = format!("{:?} is no place that requests can be sent to: {error}", redact_url(url.as_str()));
            Error::new(ErrorKind::InvalidInput, sentence).with_backend(NAME)
        })?;
        headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
        let agent = concat!("polymq/", env!("CARGO_PKG_VERSION"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(agent));
        if let Some(shown) = link.shown_to_proxy(&uri) {
            headers.insert(header::PROXY_AUTHORIZATION, shown);
        }
        let is_http1 = link.config.http2 == Http2::Off || url.scheme() == "http" && link.config.http2 != Http2::Only;
        // Written once, where the client would write the same for each request. In HTTP/2 it is no header.
        if url.scheme() == "http" && is_http1 {
            let host = url.host_str().unwrap_or_default();
            let authority = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
            if let Ok(value) = HeaderValue::try_from(authority) {
                headers.insert(header::HOST, value);
            }
        }
        Ok(Self { uri, headers, shows_token, is_http1 })
    }

    /// A request without a body.
    pub(crate) fn request(self: &Arc<Self>, link: &Link, method: Method, limit: Duration) -> Result<Outbound> {
        let mut request = Request::new(Full::<Bytes>::default());
        *request.method_mut() = method;
        *request.uri_mut() = self.uri.clone();
        let headers = request.headers_mut();
        headers.reserve(USUAL_HEADERS);
        headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
        if self.shows_token {
            link.show_token(headers)?;
        }
        Ok(Outbound { request, limit, place: Arc::clone(self), is_kept: !self.is_http1 })
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("uri", &redact_url(&self.uri.to_string())).finish_non_exhaustive()
    }
}

/// The user and password of a URL (RFC 7617).
fn login(url: &Url) -> Option<HeaderValue> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let decoded = |text| percent_decode_str(text).collect::<Vec<u8>>();
    let login = [&decoded(url.username())[..], b":", &decoded(url.password().unwrap_or_default())].concat();
    let mut login = HeaderValue::try_from(format!("Basic {}", BASE64_STANDARD.encode(login))).ok()?;
    login.set_sensitive(true);
    Some(login)
}

//! Where settings lead, and as whom: the endpoints of SQS and SNS, and a login.

use polymq_core::{
    Result, Secret,
    config::{is_loopback, percent_decoded, redact_url},
};
use url::Url;

use crate::{config::SqsConfig, error::config};

/// The endpoints of the two services and a login; what is missing is what the AWS configuration says.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) sqs: Option<String>,
    pub(crate) sns: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) secret: Option<Secret>,
}

impl Place {
    /// Where settings lead, and as whom.
    pub(crate) fn of(settings: &SqsConfig) -> Result<Self> {
        let mut place = Self {
            sqs: settings.endpoint.clone(),
            sns: settings.endpoint.clone(),
            key: settings.access_key_id.clone(),
            secret: settings.secret_access_key.clone(),
        };
        if let Some(url) = &settings.url {
            place.read(url.expose())?;
        }
        place.sqs = settings.sqs_endpoint.clone().or(place.sqs);
        place.sns = settings.sns_endpoint.clone().or(place.sns);
        if place.key.is_some() != place.secret.is_some() {
            return Err(config("an access key without its secret, or a secret without its key")
                .with_hint("set access_key_id and secret_access_key, or write sqs://KEY:SECRET@host:port"));
        }
        place.endpoints().try_for_each(|endpoint| check_endpoint(endpoint, settings.allow_plaintext_remote))?;
        Ok(place)
    }

    /// What the URL says is stronger than the keys, which fill what it leaves out.
    fn read(&mut self, text: &str) -> Result<()> {
        let invalid = || {
            config("setting \"url\" is not valid, expected sqs://, or sqs:// or sqss://KEY:SECRET@host:port")
                .with_hint("write special characters in key and secret as %XX")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        let decoded = |text: &str| percent_decoded(text).ok_or_else(invalid);
        if !url.username().is_empty() {
            self.key = Some(decoded(url.username())?);
            self.secret = url.password().map(decoded).transpose()?.map(Secret::new);
        }
        if !matches!(url.path(), "" | "/") {
            return Err(invalid());
        }
        if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
            let scheme = if url.scheme() == "sqss" { "https" } else { "http" };
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            self.sqs = Some(format!("{scheme}://{host}{port}"));
            self.sns.clone_from(&self.sqs);
        }
        Ok(())
    }

    fn endpoints(&self) -> impl Iterator<Item = &str> {
        [&self.sqs, &self.sns].into_iter().filter_map(Option::as_deref)
    }

    /// Whether neither service is where its region says, and may know nothing of regions.
    pub(crate) fn is_named(&self) -> bool {
        self.sqs.is_some() && self.sns.is_some()
    }

    /// Whether both services are reached without TLS.
    pub(crate) fn is_plain(&self) -> bool {
        [&self.sqs, &self.sns].iter().all(|endpoint| endpoint.as_deref().is_some_and(|url| url.starts_with("http://")))
    }
}

fn check_endpoint(endpoint: &str, allow_plaintext_remote: bool) -> Result<()> {
    let url = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    let Some(url) = url else {
        return Err(config(format!(
            "the endpoint {:?} is not valid, expected http://host:port or https://host:port",
            redact_url(endpoint)
        )));
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err(config("credentials stand in an endpoint, which is shown in errors")
            .with_hint("write them into the URL of the backend, or into access_key_id and secret_access_key"));
    }
    let host = url.host_str().unwrap_or_default();
    if url.scheme() == "http" && !allow_plaintext_remote && !is_loopback(host) {
        return Err(config(format!("credentials and messages would travel in clear text to {host:?}"))
            .with_hint("use sqss:// or https://, or set allow_plaintext_remote=true for a network that you trust"));
    }
    Ok(())
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.sqs.as_deref().unwrap_or("AWS"))
    }
}

//! The clients of the two services, with what they need to be let in.

use std::sync::Arc;

use aws_config::{
    BehaviorVersion, Region, SdkConfig, environment::EnvironmentVariableRegionProvider,
    meta::region::RegionProviderChain, profile::ProfileFileRegionProvider, retry::RetryConfig, timeout::TimeoutConfig,
};
use aws_credential_types::{Credentials, provider::SharedCredentialsProvider};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use aws_smithy_runtime_api::client::http::SharedHttpClient;
use polymq_core::{ErrorKind, Result};
use tokio::time::timeout;

use crate::{
    NAME,
    config::SqsConfig,
    error::{self, Effect},
    place::Place,
    policy::Grants,
};

/// Where a server of one's own is said to be, where nothing says more.
const DEFAULT_REGION: &str = "us-east-1";

/// What a certificate in a PEM file begins with.
const CERTIFICATE: &[u8] = b"-----BEGIN CERTIFICATE-----";

/// Clients of both services, and what was done with them that they may not show yet.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    pub(crate) sqs: aws_sdk_sqs::Client,
    pub(crate) sns: aws_sdk_sns::Client,
    pub(crate) grants: Arc<Grants>,
}

/// Clients that live now.
pub(crate) type Live = polymq_core::watch::Live<Clients>;

/// Asks for one queue's name. A user who may not list queues is a user who was let in.
pub(crate) async fn ask(live: &Clients) -> Result<()> {
    match live.sqs.list_queues().max_results(1).send().await {
        Ok(_) => Ok(()),
        Err(native) => match error::native("connect", Effect::Idempotent, native) {
            error if error.kind() == ErrorKind::PermissionDenied => Ok(()),
            error => Err(error),
        },
    }
}

/// The region that is named. A server of one's own may know nothing of regions, but requests to it are signed for one.
async fn region(config: &SqsConfig, place: &Place) -> Option<Region> {
    match &config.region {
        Some(region) => Some(Region::new(region.clone())),
        // Where AWS programs look, but not the machine: it may be no part of AWS, and would not answer.
        None if place.is_named() => {
            let mut files = ProfileFileRegionProvider::builder();
            if let Some(profile) = &config.profile {
                files = files.profile_name(profile);
            }
            let found = EnvironmentVariableRegionProvider::new();
            let found = RegionProviderChain::first_try(found).or_else(files.build());
            found.or_else(Region::from_static(DEFAULT_REGION)).region().await
        }
        None => None,
    }
}

/// Region and credentials, from the settings where they name them, else as every AWS program finds them.
async fn base(config: &SqsConfig, place: &Place) -> Result<SdkConfig> {
    let mut loader = aws_config::defaults(BehaviorVersion::latest());
    // Retries are ours: the client library would send a message twice.
    loader = loader.retry_config(RetryConfig::disabled());
    let region = region(config, place).await;
    if let Some(region) = region.clone() {
        loader = loader.region(region);
    }
    if let Some(profile) = &config.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(file) = &config.credentials_file {
        let files = EnvConfigFiles::builder().include_default_config_file(true);
        loader = loader.profile_files(files.with_file(EnvConfigFileKind::Credentials, file).build());
    }
    let given = match (&place.key, &place.secret) {
        (Some(key), Some(secret)) => {
            let token = config.session_token.as_ref().map(|token| token.expose().to_owned());
            Some(Credentials::new(key, secret.expose(), token, None, NAME))
        }
        _ => None,
    };
    if let (Some(credentials), Some(region)) = (&given, region) {
        // All is said: nothing is to be asked of the machine.
        return Ok(SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(region)
            .credentials_provider(SharedCredentialsProvider::new(credentials.clone()))
            .retry_config(RetryConfig::disabled())
            .sleep_impl(aws_smithy_async_sleep())
            .build());
    }
    if let Some(credentials) = given {
        loader = loader.credentials_provider(credentials);
    }
    // Credentials may come from services of their own.
    let loaded = loader.http_client(http(config, false)?).load().await;
    if loaded.region().is_none() {
        return Err(
            error::config("the region is not known").with_hint("set region, AWS_REGION or the profile's region")
        );
    }
    Ok(loaded)
}

fn aws_smithy_async_sleep() -> aws_smithy_async::rt::sleep::SharedAsyncSleep {
    aws_smithy_async::rt::sleep::SharedAsyncSleep::new(aws_smithy_async::rt::sleep::TokioSleep::new())
}

/// Clients with connections of their own, and with the credentials that are found now.
pub(crate) async fn clients(config: &SqsConfig, grants: Arc<Grants>) -> Result<Clients> {
    let place = config.place()?;
    // Large, and not often needed.
    let loading = Box::pin(base(config, &place));
    let loaded = timeout(config.connect_timeout, loading).await;
    let base = &loaded.map_err(|_| error::disconnected("connect", "the credentials were not found in time"))??;
    let http = http(config, place.is_plain())?;
    let timeouts = TimeoutConfig::builder().connect_timeout(config.connect_timeout).build();
    // A long poll that waits is no stalled stream.
    let stalled = aws_config::stalled_stream_protection::StalledStreamProtectionConfig::disabled;
    let mut sqs =
        aws_sdk_sqs::config::Builder::from(base).http_client(http.clone()).stalled_stream_protection(stalled());
    let mut sns = aws_sdk_sns::config::Builder::from(base).http_client(http).stalled_stream_protection(stalled());
    sqs = sqs.retry_config(RetryConfig::disabled()).timeout_config(timeouts.clone());
    sns = sns.retry_config(RetryConfig::disabled()).timeout_config(timeouts);
    if let Some(endpoint) = place.sqs {
        sqs = sqs.endpoint_url(endpoint);
    }
    if let Some(endpoint) = place.sns {
        sns = sns.endpoint_url(endpoint);
    }
    let (sqs, sns) = (aws_sdk_sqs::Client::from_conf(sqs.build()), aws_sdk_sns::Client::from_conf(sns.build()));
    Ok(Clients { sqs, sns, grants })
}

fn http(config: &SqsConfig, is_plain: bool) -> Result<SharedHttpClient> {
    if is_plain {
        // Without the system's authorities, which take longer to read than all the rest of connecting.
        return Ok(Builder::new().build_http());
    }
    let builder = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    let Some(file) = &config.ca_file else { return Ok(builder.build_https()) };
    let pem = std::fs::read(file).map_err(|problem| {
        error::config(format!("setting \"ca_file\": {} cannot be read: {problem}", file.display()))
    })?;
    if !pem.windows(CERTIFICATE.len()).any(|window| window == CERTIFICATE) {
        return Err(error::config(format!("setting \"ca_file\": {} holds no certificate", file.display())));
    }
    let trust = TrustStore::default().with_pem_certificate(pem);
    let context = TlsContext::builder()
        .with_trust_store(trust)
        .build()
        .map_err(|problem| error::config(format!("setting \"ca_file\": {} is not valid: {problem}", file.display())))?;
    Ok(builder.tls_context(context).build_https())
}

//! TLS: the server's certificate, and whose certificates clients must show.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{Error as PemError, PemObject},
};
use tokio_rustls::rustls::{
    self, RootCertStore, ServerConfig,
    crypto::ring::default_provider,
    server::{VerifierBuilderError, WebPkiClientVerifier},
};

use crate::error::{BrokerError, Result};

/// PEM files.
#[derive(Debug, Clone)]
pub(crate) struct TlsFiles {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) client_ca: Option<PathBuf>,
}

impl TlsFiles {
    /// Reads everything. A client's certificate is demanded when there is an authority for it.
    pub(crate) fn read(&self) -> Result<Arc<ServerConfig>> {
        let chain = certificates(&self.certificate)?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|cause| match cause {
            PemError::NoItemsFound => {
                wrong(&self.key, "there is no private key in it: expected PEM (BEGIN PRIVATE KEY)")
            }
            cause => unreadable(&self.key, &cause),
        })?;
        let provider = Arc::new(default_provider());
        let versions = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
        let builder = versions.map_err(|cause| wrong(&self.certificate, &cause.to_string()))?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let mut roots = RootCertStore::empty();
                for certificate in certificates(file)? {
                    roots.add(certificate).map_err(|cause| {
                        wrong(file, &format!("a certificate in it cannot be an authority for clients: {cause}"))
                    })?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(
                    verifier.map_err(|cause: VerifierBuilderError| wrong(file, &cause.to_string()))?,
                )
            }
        };
        let mut config = builder.with_single_cert(chain, key).map_err(|cause| match cause {
            rustls::Error::InconsistentKeys(_) => wrong(
                &self.key,
                &format!(
                    "the key is not the one of the certificate in {}: give the two that belong together",
                    self.certificate.display()
                ),
            ),
            cause => wrong(&self.certificate, &format!("the certificate or its key cannot be used: {cause}")),
        })?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_file_iter(file).map_err(|cause| unreadable(file, &cause))?;
    let found = found.collect::<std::result::Result<Vec<_>, _>>().map_err(|cause| unreadable(file, &cause))?;
    if found.is_empty() {
        return Err(wrong(file, "there is no certificate in it: expected PEM (BEGIN CERTIFICATE)"));
    }
    Ok(found)
}

fn unreadable(file: &Path, cause: &PemError) -> BrokerError {
    match cause {
        PemError::Io(cause) => wrong(file, &format!("it cannot be read: {cause}")),
        cause => wrong(file, &format!("it is not proper PEM: {cause}")),
    }
}

fn wrong(file: &Path, what: &str) -> BrokerError {
    BrokerError::Option { file: file.to_owned(), what: what.to_owned() }
}

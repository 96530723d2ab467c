//! Authentication: HTTP basic, and the token scheme of Docker's registries (distribution specification, "token").

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use serde::Deserialize;

use super::endpoint::{Endpoint, chain};
use crate::image::error::ImageError;

/// Largest answer of a token server, in bytes.
const MAX_TOKEN: u64 = 1 << 20;

/// Credentials for a registry: the kinds of CRI's `AuthConfig`.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// A user, with a password or an access token that stands for one.
    Basic {
        /// User.
        username: String,
        /// Password.
        password: String,
    },
    /// A bearer token for the registry itself.
    Bearer(String),
    /// A refresh token for the registry's token server.
    Identity(String),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Basic { username, .. } => f
                .debug_struct("Basic")
                .field("username", username)
                .finish_non_exhaustive(),
            Self::Bearer(_) => f.write_str("Bearer(…)"),
            Self::Identity(_) => f.write_str("Identity(…)"),
        }
    }
}

impl Auth {
    /// Credentials from a `config.json`'s `auth` value: base64 of `user:password`.
    ///
    /// # Errors
    /// [`ImageError::Unsupported`] if it is something else.
    pub fn from_encoded(encoded: &str) -> Result<Self, ImageError> {
        let wrong = || {
            ImageError::unsupported(
                "the registry's auth value",
                "it is not base64 of user:password",
            )
        };
        let bytes = STANDARD.decode(encoded.trim()).map_err(|_| wrong())?;
        let text = String::from_utf8(bytes).map_err(|_| wrong())?;
        let (username, password) = text
            .trim_end_matches('\0')
            .split_once(':')
            .ok_or_else(wrong)?;
        Ok(Self::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        })
    }

    fn basic(&self) -> Option<String> {
        match self {
            Self::Basic { username, password } => Some(format!(
                "Basic {}",
                STANDARD.encode(format!("{username}:{password}"))
            )),
            _ => None,
        }
    }
}

/// What a registry asks for in `WWW-Authenticate` (RFC 9110 §11.6.1).
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Endpoint {
    /// Gets the header that answers one of the challenges, for the requests that follow.
    pub(super) async fn authenticate(&self, challenges: &[String]) -> Result<(), ImageError> {
        let parsed: Vec<Challenge> = challenges.iter().filter_map(|text| parse(text)).collect();
        let auth = self.auth.as_ref();
        let value = if let Some(Auth::Bearer(token)) = auth {
            format!("Bearer {token}")
        } else if let Some(bearer) = parsed
            .iter()
            .find(|challenge| matches!(challenge, Challenge::Bearer { .. }))
        {
            format!("Bearer {}", self.token(bearer, auth).await?)
        } else if parsed.contains(&Challenge::Basic) {
            auth.and_then(Auth::basic)
                .ok_or_else(|| self.unauthorized("it asks for a user and a password".to_owned()))?
        } else {
            return Err(self.unauthorized(
                "it asks for a kind of authentication that is not known".to_owned(),
            ));
        };
        let mut header = HeaderValue::try_from(value).map_err(|_| {
            self.unauthorized("the credentials have characters that HTTP does not allow".to_owned())
        })?;
        header.set_sensitive(true);
        *self.header.lock().await = Some(header);
        Ok(())
    }

    async fn token(
        &self,
        challenge: &Challenge,
        auth: Option<&Auth>,
    ) -> Result<String, ImageError> {
        let Challenge::Bearer {
            realm,
            service,
            scope,
        } = challenge
        else {
            return Err(self.unauthorized("it asks for no token".to_owned()));
        };
        let url = reqwest::Url::parse(realm)
            .map_err(|_| self.failed("its token server has no valid URL".to_owned()))?;
        // The credentials go there: over a connection that is no worse than the registry's own.
        if url.scheme() != "https" && (url.scheme() != "http" || self.is_secure()) {
            return Err(self.failed("its token server is not on https".to_owned()));
        }
        let default_scope = format!("repository:{}:pull", self.repository);
        let mut query = vec![("scope", scope.as_deref().unwrap_or(&default_scope))];
        query.extend(service.as_deref().map(|service| ("service", service)));
        let request = if let Some(Auth::Identity(token)) = auth {
            query.extend([
                ("grant_type", "refresh_token"),
                ("client_id", "caisson"),
                ("refresh_token", token),
            ]);
            // An URL's query is the form encoding too.
            let mut form = url.clone();
            form.query_pairs_mut().clear().extend_pairs(&query);
            let form = form.query().unwrap_or_default().to_owned();
            self.client
                .post(url)
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form)
        } else {
            let mut url = url;
            url.query_pairs_mut().extend_pairs(&query);
            let request = self.client.get(url);
            match auth.and_then(Auth::basic) {
                Some(basic) => request.header(AUTHORIZATION, basic),
                None => request,
            }
        };
        let response = tokio::time::timeout(self.stall, request.send())
            .await
            .map_err(|_| self.stalled("a token"))?
            .map_err(|error| self.failed(chain(&error)))?;
        let status = response.status();
        if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
            return Err(self.failed(format!("its token server answers {status}")));
        }
        if !status.is_success() {
            return Err(self.unauthorized(format!("its token server answers {status}")));
        }
        let bytes = self.body(response, "a token").all(MAX_TOKEN).await?;
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let answer: Answer = serde_json::from_slice(&bytes)
            .map_err(|error| self.failed(format!("its token is not valid: {error}")))?;
        answer
            .token
            .or(answer.access_token)
            .filter(|token| !token.is_empty())
            .ok_or_else(|| self.unauthorized("its token server gives no token".to_owned()))
    }
}

/// Parses one header: a scheme and `key=value` pairs, the values quoted or not.
fn parse(text: &str) -> Option<Challenge> {
    let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service, mut scope) = (None, None, None);
    let mut rest = rest.trim_start();
    while !rest.is_empty() {
        let (key, after) = rest.split_once('=')?;
        let (value, after) = match after.strip_prefix('"') {
            Some(quoted) => quoted_string(quoted)?,
            None => {
                let end = after.find(',').unwrap_or(after.len());
                (after[..end].trim().to_owned(), &after[end..])
            }
        };
        match key.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            "scope" => scope = Some(value),
            _ => {}
        }
        rest = after.trim_start().trim_start_matches(',').trim_start();
    }
    Some(Challenge::Bearer {
        realm: realm?,
        service,
        scope,
    })
}

#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(text: &str) {
    let _ = parse(text);
    let _ = Auth::from_encoded(text);
}

/// A quoted string after its opening quote, and what follows it.
fn quoted_string(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges() {
        let text = r#"Bearer realm="https://auth.io/token",service="reg, \"x\"",scope="repository:a/b:pull,push""#;
        assert_eq!(
            parse(text),
            Some(Challenge::Bearer {
                realm: "https://auth.io/token".to_owned(),
                service: Some(r#"reg, "x""#.to_owned()),
                scope: Some("repository:a/b:pull,push".to_owned()),
            })
        );
        assert_eq!(parse(r#"Basic realm="x""#), Some(Challenge::Basic));
        assert!(parse("bearer realm=http://a/b, service=c").is_some());
        for bad in [
            "",
            "Negotiate",
            "Bearer",
            "Bearer realm",
            r#"Bearer realm="x"#,
            r#"Bearer service="x""#,
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn encoded_credentials() {
        let auth = Auth::from_encoded("dXNlcjpwYTpzcw==").unwrap();
        assert_eq!(
            auth,
            Auth::Basic {
                username: "user".to_owned(),
                password: "pa:ss".to_owned()
            }
        );
        assert!(!format!("{auth:?}").contains("pa:ss"));
        assert!(Auth::from_encoded("dXNlcg==").is_err());
        assert!(Auth::from_encoded("%").is_err());
    }
}

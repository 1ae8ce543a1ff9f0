//! Calls about the daemon's settings.

use pileus_api::{Setting, SettingRequest, routes};
use pileus_base::Result;
use reqwest::Method;

use crate::Client;

impl Client {
    pub async fn settings(&self) -> Result<Vec<Setting>> {
        self.get(routes::SETTINGS).await
    }

    pub async fn setting(&self, key: &str) -> Result<Setting> {
        self.get(&routes::fill(routes::SETTING, key)).await
    }

    pub async fn set(&self, key: &str, value: &str) -> Result<Setting> {
        let value = value.to_owned();
        let path = routes::fill(routes::SETTING, key);
        let request = self.request(Method::PUT, &path);
        self.answer(request.json(&SettingRequest { value })).await
    }
}

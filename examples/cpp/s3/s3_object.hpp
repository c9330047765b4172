// S3Object: an object in a bucket of Amazon S3, or of a server with its interface, which safetensors_torch reads as a
// file.
//
//     const std::string url = "s3://bucket/model.safetensors";
//     const auto tensors = safetensors_torch::load_file(std::make_shared<S3Object>(url), url, at::kCUDA);
//
// Needs libcurl 7.84 or later, which also signs the requests.
#pragma once

#include <curl/curl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <safetensors_torch.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

// The server, its region, and the credentials.
struct S3Config {
    std::string endpoint;  // such as http://127.0.0.1:9000; empty for Amazon's
    std::string region;
    std::string key_id, secret_key, session_token;  // requests are not signed if key_id is empty

    // Returns what the environment variables of Amazon's tools say.
    static S3Config from_environment() {
        const auto variable = [](const char* name, const char* otherwise = "") {
            const char* const value = std::getenv(name);
            return std::string(value != nullptr && *value != '\0' ? value : otherwise);
        };
        return {variable("AWS_ENDPOINT_URL"), variable("AWS_REGION", "us-east-1"), variable("AWS_ACCESS_KEY_ID"),
                variable("AWS_SECRET_ACCESS_KEY"), variable("AWS_SESSION_TOKEN")};
    }
};

// One version of an object: once it is replaced, reads fail with SFT_ERROR_FILE_CHANGED. Each thread that reads has a
// connection of its own, which stays open for later reads.
class S3Object : public safetensors_torch::Source {
  public:
    explicit S3Object(const std::string& url, const S3Config& config = S3Config::from_environment())
        : config_(config), url_(http_url(url, config)) {
        static const CURLcode initialized = curl_global_init(CURL_GLOBAL_DEFAULT);
        check(initialized);
        if (is_signed()) {
            // S3 requires this header, which old versions of libcurl do not add.
            add_header("x-amz-content-sha256: UNSIGNED-PAYLOAD");
            if (!config.session_token.empty()) {
                add_header("x-amz-security-token: " + config.session_token);
            }
        }
    }

    std::uint64_t length() override {
        const std::lock_guard<std::mutex> lock(length_mutex_);
        if (!has_length_) {
            // Asks for the first byte: an error of HEAD has no body that explains it.
            char byte = 0;
            const sft_buffer buffer{&byte, 1};
            const Answer answer = get(0, &buffer, 1);
            if (answer.etag.empty() && answer.length > 0) {
                throw std::runtime_error("the server sent no ETag, so a replaced object would not be noticed");
            }
            // Later requests are for this version only.
            add_header("If-Match: " + answer.etag);
            length_ = answer.length;
            has_length_ = true;
        }
        return length_;
    }

    void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) override {
        get(offset, buffers, count);
    }

  private:
    static constexpr int kAttempts = 6;
    static constexpr int kPauseMilliseconds = 200;
    static constexpr long kConnectSeconds = 10;
    // A transfer that is slower for this long has failed.
    static constexpr long kSlowBytesPerSecond = 1024, kSlowSeconds = 10;
    static constexpr std::size_t kErrorBytes = 16 << 10;

    struct Free {
        void operator()(CURL* handle) const { curl_easy_cleanup(handle); }
        void operator()(curl_slist* list) const { curl_slist_free_all(list); }
    };

    // What the answer to a range says about the whole object.
    struct Answer {
        std::uint64_t length;
        std::string etag;
    };

    // A connection, and the request on it. One thread uses it at a time.
    struct Connection {
        std::unique_ptr<CURL, Free> handle;
        char error[CURL_ERROR_SIZE] = "";     // libcurl's
        std::string body;                     // the server's error
        const sft_buffer* buffers = nullptr;  // those that are not full
        std::size_t filled = 0;               // bytes of the first of them
        std::size_t remaining = 0;            // bytes of all of them

        long status() const {
            long status = 0;
            curl_easy_getinfo(handle.get(), CURLINFO_RESPONSE_CODE, &status);
            return status;
        }

        std::string header(const char* name) const {
            curl_header* found = nullptr;
            return curl_easy_header(handle.get(), name, 0, CURLH_HEADER, -1, &found) == CURLHE_OK ? found->value : "";
        }

        CURLcode get(const sft_buffer* next_buffers, std::size_t nbytes) {
            buffers = next_buffers;
            filled = 0;
            remaining = nbytes;
            body.clear();
            error[0] = '\0';
            return curl_easy_perform(handle.get());
        }

        // Called with each part of a body. To take less than all of it ends the transfer.
        static std::size_t receive(const char* data, std::size_t, std::size_t size, void* context) {
            auto& connection = *static_cast<Connection*>(context);
            const long status = connection.status();
            if (status == 206) {
                return connection.fill(data, size);
            }
            // Not the whole object, which follows 200.
            const std::size_t taken = status == 200 ? 0 : std::min(size, kErrorBytes - connection.body.size());
            connection.body.append(data, taken);
            return taken;
        }

        std::size_t fill(const char* data, std::size_t size) {
            const std::size_t taken = std::min(size, remaining);
            remaining -= taken;
            for (std::size_t left = taken; left > 0;) {
                const std::size_t part = std::min(left, buffers->nbytes - filled);
                std::memcpy(static_cast<char*>(buffers->data) + filled, data, part);
                data += part;
                left -= part;
                filled += part;
                if (filled == buffers->nbytes) {
                    ++buffers;
                    filled = 0;
                }
            }
            return taken;
        }
    };

    // Fills the buffers with the bytes from `first` on. Repeats requests that fail for reasons that pass.
    Answer get(std::uint64_t first, const sft_buffer* buffers, std::size_t count) {
        std::size_t nbytes = 0;
        for (std::size_t i = 0; i < count; ++i) {
            nbytes += buffers[i].nbytes;
        }
        const std::string range = std::to_string(first) + "-" + std::to_string(first + nbytes - 1);
        // An error destroys it: its connection may be in any state.
        std::unique_ptr<Connection> connection = take_connection();
        check(curl_easy_setopt(connection->handle.get(), CURLOPT_RANGE, range.c_str()));
        check(curl_easy_setopt(connection->handle.get(), CURLOPT_HTTPHEADER, headers_.get()));
        for (int attempt = 1;; ++attempt) {
            const CURLcode code = connection->get(buffers, nbytes);
            const long status = connection->status();
            Answer answer{0, connection->header("ETag")};
            const bool is_range = code == CURLE_OK && status == 206 && connection->remaining == 0 &&
                                  parse_content_range(connection->header("Content-Range"), range, answer.length);
            // An empty object has no first byte.
            if (is_range || (first == 0 && status == 416)) {
                const std::lock_guard<std::mutex> lock(idle_mutex_);
                idle_.push_back(std::move(connection));
                return answer;
            }
            if (attempt == kAttempts || !may_pass(code, status)) {
                fail(*connection, code, range);
            }
            // A random time, so that threads which failed together do not come back together.
            thread_local std::minstd_rand random{std::random_device{}()};
            std::uniform_int_distribution<int> pause(0, kPauseMilliseconds << (attempt - 1));
            std::this_thread::sleep_for(std::chrono::milliseconds(pause(random)));
        }
    }

    // Returns an idle connection, or a new one.
    std::unique_ptr<Connection> take_connection() {
        {
            const std::lock_guard<std::mutex> lock(idle_mutex_);
            if (!idle_.empty()) {
                std::unique_ptr<Connection> connection = std::move(idle_.back());
                idle_.pop_back();
                return connection;
            }
        }
        auto connection = std::make_unique<Connection>();
        CURL* const handle = curl_easy_init();
        connection->handle.reset(handle);
        check(handle == nullptr ? CURLE_OUT_OF_MEMORY : CURLE_OK);
        check(curl_easy_setopt(handle, CURLOPT_URL, url_.c_str()));
        // Keys may contain "..".
        check(curl_easy_setopt(handle, CURLOPT_PATH_AS_IS, 1L));
        check(curl_easy_setopt(handle, CURLOPT_WRITEFUNCTION, &Connection::receive));
        check(curl_easy_setopt(handle, CURLOPT_WRITEDATA, connection.get()));
        check(curl_easy_setopt(handle, CURLOPT_ERRORBUFFER, connection->error));
        check(curl_easy_setopt(handle, CURLOPT_BUFFERSIZE, static_cast<long>(CURL_MAX_READ_SIZE)));
        check(curl_easy_setopt(handle, CURLOPT_CONNECTTIMEOUT, kConnectSeconds));
        check(curl_easy_setopt(handle, CURLOPT_LOW_SPEED_LIMIT, kSlowBytesPerSecond));
        check(curl_easy_setopt(handle, CURLOPT_LOW_SPEED_TIME, kSlowSeconds));
        // Programs with threads need it.
        check(curl_easy_setopt(handle, CURLOPT_NOSIGNAL, 1L));
        if (is_signed()) {
            check(curl_easy_setopt(handle, CURLOPT_AWS_SIGV4, ("aws:amz:" + config_.region + ":s3").c_str()));
            check(curl_easy_setopt(handle, CURLOPT_USERNAME, config_.key_id.c_str()));
            check(curl_easy_setopt(handle, CURLOPT_PASSWORD, config_.secret_key.c_str()));
        }
        return connection;
    }

    // Returns whether the same request may succeed later.
    static bool may_pass(CURLcode code, long status) {
        if (status != 0 && status != 206) {
            return status == 429 || status >= 500;
        }
        switch (code) {
            case CURLE_OK:  // with a status 206, for other bytes
            case CURLE_COULDNT_CONNECT:
            case CURLE_COULDNT_RESOLVE_HOST:
            case CURLE_GOT_NOTHING:
            case CURLE_HTTP2:
            case CURLE_HTTP2_STREAM:
            case CURLE_OPERATION_TIMEDOUT:
            case CURLE_PARTIAL_FILE:
            case CURLE_RECV_ERROR:
            case CURLE_SEND_ERROR:
            case CURLE_SSL_CONNECT_ERROR:
                return true;
            default:
                return false;
        }
    }

    // Throws the error of the last request. The library adds the name of the object.
    [[noreturn]] static void fail(const Connection& connection, CURLcode code, const std::string& range) {
        using safetensors_torch::Error, safetensors_torch::ErrorCategory;
        const auto error = [](const std::string& text, int os_error = EIO) {
            return Error(text, ErrorCategory::os, SFT_ERROR_IO, os_error);
        };
        const long status = connection.status();
        if (status == 412) {
            throw Error("the object was replaced while it was read; open it again", ErrorCategory::safetensor,
                        SFT_ERROR_FILE_CHANGED, 0);
        }
        if (status == 200) {
            throw error("the server ignores Range; download the object, then load the file");
        }
        if (status == 206 && code == CURLE_OK) {
            throw error("asked for bytes " + range + ", the server returned " + connection.header("Content-Range"));
        }
        if (status == 0 || status == 206) {
            long os_error = 0;
            curl_easy_getinfo(connection.handle.get(), CURLINFO_OS_ERRNO, &os_error);
            if (os_error == 0) {
                os_error = code == CURLE_OPERATION_TIMEDOUT ? ETIMEDOUT : EIO;
            }
            throw error(connection.error[0] != '\0' ? connection.error : curl_easy_strerror(code),
                        static_cast<int>(os_error));
        }
        std::string text = "HTTP status " + std::to_string(status);
        // Other elements of the body may contain the key or the token.
        for (const char* const element : {"Code", "Message"}) {
            const std::string value = xml_text(connection.body, element);
            text += value.empty() ? "" : ": " + value;
        }
        if (text.back() == '.') {
            text.pop_back();
        }
        switch (status) {
            case 301:
            case 307:
            case 400:
                throw error(text + "; check AWS_REGION and AWS_ENDPOINT_URL");
            case 401:
            case 403:
                throw error(text + "; check AWS_ACCESS_KEY_ID and the policy of the bucket", EACCES);
            case 404:
                throw error(text, ENOENT);
            default:
                throw error(text);
        }
    }

    // Returns the text of the first element `name`, or "" if there is none.
    static std::string xml_text(const std::string& xml, const std::string& name) {
        const std::string tag = "<" + name + ">";
        const std::size_t begin = xml.find(tag), end = xml.find("</" + name + ">");
        return begin < end && end != std::string::npos ? xml.substr(begin + tag.size(), end - begin - tag.size()) : "";
    }

    // Parses a Content-Range, such as "bytes 0-99/1000". Returns false if it is of another range or without a length.
    static bool parse_content_range(std::string_view header, const std::string& range, std::uint64_t& length) {
        const std::string prefix = "bytes " + range + "/";
        if (header.substr(0, prefix.size()) != prefix) {
            return false;
        }
        header.remove_prefix(prefix.size());
        const auto [stop, error] = std::from_chars(header.data(), header.data() + header.size(), length);
        return error == std::errc() && stop == header.data() + header.size();
    }

    // Returns the URL of s3://BUCKET/KEY. The bucket is a part of the host if it is Amazon's and the certificate allows
    // it, which a dot in the name does not; otherwise, of the path.
    static std::string http_url(const std::string& url, const S3Config& config) {
        const std::string scheme = "s3://";
        const std::size_t slash = url.find('/', scheme.size());
        if (url.compare(0, scheme.size(), scheme) != 0 || slash == scheme.size() || slash >= url.size() - 1) {
            throw std::invalid_argument("not an object in a bucket; write s3://BUCKET/KEY");
        }
        const std::string bucket = url.substr(scheme.size(), slash - scheme.size());
        const std::string key = percent_encode(url.substr(slash + 1));
        const std::string host = "s3." + config.region + ".amazonaws.com";
        if (config.endpoint.empty() && bucket.find('.') == std::string::npos) {
            return "https://" + bucket + "." + host + "/" + key;
        }
        std::string endpoint = config.endpoint.empty() ? "https://" + host : config.endpoint;
        while (endpoint.back() == '/') {
            endpoint.pop_back();
        }
        return endpoint + "/" + bucket + "/" + key;
    }

    // Encodes a key as signatures require.
    static std::string percent_encode(const std::string& key) {
        constexpr std::string_view kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/";
        constexpr std::string_view kDigits = "0123456789ABCDEF";
        std::string encoded;
        for (const char character : key) {
            if (kPlain.find(character) != std::string_view::npos) {
                encoded += character;
            } else {
                const auto byte = static_cast<unsigned char>(character);
                encoded += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
            }
        }
        return encoded;
    }

    static void check(CURLcode code) {
        if (code != CURLE_OK) {
            throw std::runtime_error(std::string("libcurl: ") + curl_easy_strerror(code));
        }
    }

    bool is_signed() const { return !config_.key_id.empty(); }

    void add_header(const std::string& line) {
        curl_slist* const list = curl_slist_append(headers_.get(), line.c_str());
        check(list == nullptr ? CURLE_OUT_OF_MEMORY : CURLE_OK);
        if (headers_ == nullptr) {
            headers_.reset(list);
        }
    }

    const S3Config config_;
    const std::string url_;
    std::unique_ptr<curl_slist, Free> headers_;  // complete before the first call of read

    std::mutex length_mutex_;
    bool has_length_ = false;
    std::uint64_t length_ = 0;

    std::mutex idle_mutex_;
    std::vector<std::unique_ptr<Connection>> idle_;
};

// The objects of all buckets, by their URLs: checkpoints of several files.
class S3Filesystem : public safetensors_torch::Filesystem {
  public:
    explicit S3Filesystem(S3Config config = S3Config::from_environment()) : config_(std::move(config)) {}

    std::shared_ptr<safetensors_torch::Source> open(const std::string& url) override {
        return std::make_shared<S3Object>(url, config_);
    }

  private:
    S3Config config_;
};

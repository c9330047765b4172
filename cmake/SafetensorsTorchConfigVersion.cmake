# The version of the installed package, from its C header. Versions are compatible within one major version, and before
# 1.0 within one minor version.

get_filename_component(_st_header "${CMAKE_CURRENT_LIST_DIR}/../../../include/safetensors_torch.h" ABSOLUTE)
file(STRINGS "${_st_header}" _st_line REGEX "^#define SFT_VERSION_STRING \"" LIMIT_COUNT 1)
string(REGEX REPLACE "^[^\"]*\"([0-9.]+)[^\"]*\".*$" "\\1" PACKAGE_VERSION "${_st_line}")

if(PACKAGE_VERSION MATCHES "^0\\.([0-9]+)")
  set(_st_series "^0\\.${CMAKE_MATCH_1}(\\.|$)")
elseif(PACKAGE_VERSION MATCHES "^([0-9]+)")
  set(_st_series "^${CMAKE_MATCH_1}(\\.|$)")
endif()
if(PACKAGE_FIND_VERSION VERSION_EQUAL PACKAGE_VERSION)
  set(PACKAGE_VERSION_EXACT TRUE)
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
elseif(PACKAGE_FIND_VERSION VERSION_LESS PACKAGE_VERSION AND
       (PACKAGE_FIND_VERSION MATCHES "${_st_series}" OR PACKAGE_FIND_VERSION STREQUAL "0"))
  set(PACKAGE_VERSION_COMPATIBLE TRUE)
else()
  set(PACKAGE_VERSION_COMPATIBLE FALSE)
endif()
